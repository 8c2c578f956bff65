"""Imports diffusers' pipelines without transformers' advice to install torchvision, which nothing here needs."""

from transformers.utils import logging

_level = logging.get_verbosity()
logging.set_verbosity_error()
from diffusers import StableDiffusion3Pipeline as _  # noqa: E402, F401

logging.set_verbosity(_level)
