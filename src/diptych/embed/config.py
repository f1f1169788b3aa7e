"""What can be embedded."""

from typing import Literal

InputKind = Literal["image", "text"]
