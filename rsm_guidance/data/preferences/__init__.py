"""Preference data: read from published formats and one's own, checked, and cached as latents to train on."""

from rsm_guidance.data.buckets import Buckets
from rsm_guidance.data.preferences.cache import Encoder, cached_latents
from rsm_guidance.data.preferences.check import Report, check_preferences
from rsm_guidance.data.preferences.data import PreferenceData
from rsm_guidance.data.preferences.formats import FORMATS
from rsm_guidance.data.preferences.problems import Problem, Reason, Tally
from rsm_guidance.data.preferences.read import PreferenceFiles, read_preferences
from rsm_guidance.data.preferences.record import ImageSource, Preference
from rsm_guidance.data.preferences.split import part_of
from rsm_guidance.data.preferences.usable import Decoded, Duplicates, decoded

__all__ = [
    "FORMATS",
    "Buckets",
    "Decoded",
    "Duplicates",
    "Encoder",
    "ImageSource",
    "Preference",
    "PreferenceData",
    "PreferenceFiles",
    "Problem",
    "Reason",
    "Report",
    "Tally",
    "cached_latents",
    "check_preferences",
    "decoded",
    "part_of",
    "read_preferences",
]
