"""The formats of preference data by name; one that names more columns stands before one that they would also fit."""

from rsm_guidance.data.preferences.formats import (
    edit_reward,
    folder,
    hpdv2,
    hpdv3,
    image_reward,
    pick_a_pic,
    rapidata,
    tables,
)
from rsm_guidance.data.preferences.formats.base import Format, Reading

FORMATS: dict[str, Format] = {
    "pick-a-pic": pick_a_pic.FORMAT,
    "edit-reward": edit_reward.FORMAT,
    "image-reward": image_reward.IMAGES,
    "image-reward-lists": image_reward.LISTS,
    "hpdv2": hpdv2.FORMAT,
    "hpdv3": hpdv3.FORMAT,
    "rapidata": rapidata.FORMAT,
    "chosen-rejected": tables.CHOSEN,
    "labelled": tables.LABELLED,
    "folder": folder.FORMAT,
}

__all__ = ["FORMATS", "Format", "Reading"]
