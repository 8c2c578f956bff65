"""Preference data: read from published formats and one's own, checked, and cached as latents to train on."""

from rsm_guidance.data.preferences.check import Report, check
from rsm_guidance.data.preferences.formats import FORMATS
from rsm_guidance.data.preferences.problems import Problem, Reason, Tally
from rsm_guidance.data.preferences.read import PreferenceFiles, read_preferences
from rsm_guidance.data.preferences.record import ImageSource, Preference
from rsm_guidance.data.preferences.split import part_of
from rsm_guidance.data.preferences.usable import Decoded, Duplicates, decoded

__all__ = [
    "FORMATS",
    "Decoded",
    "Duplicates",
    "ImageSource",
    "Preference",
    "PreferenceFiles",
    "Problem",
    "Reason",
    "Report",
    "Tally",
    "check",
    "decoded",
    "part_of",
    "read_preferences",
]
