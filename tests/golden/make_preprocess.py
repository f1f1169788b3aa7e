"""What openai/CLIP's and open_clip's transforms make of every kind of picture.

    .venv-peers/bin/python tests/golden/make_preprocess.py        writes tests/fixtures/preprocess.json.xz

openai/CLIP's is built here of the torchvision parts that its `_transform` names, open_clip's is its own function.
Stored are the encoded pictures and the SHA-256 of each float32 result, or the error that the transform raised.
"""

import base64
import hashlib
import io
import json
import lzma
from pathlib import Path

import open_clip
import PIL
import torchvision
from open_clip.transform import PreprocessCfg, image_transform_v2
from pictures import make_pictures
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

OUT = Path(__file__).parents[1] / "fixtures" / "preprocess.json.xz"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SIZES = (224, 97, 32)


def openai_transform(size: int) -> Compose:
    to_rgb = lambda image: image.convert("RGB")  # noqa: E731
    resize = Resize(size, interpolation=InterpolationMode.BICUBIC)
    return Compose([resize, CenterCrop(size), to_rgb, ToTensor(), Normalize(MEAN, STD)])


def open_clip_transform(size: int, interpolation: str, resize_mode: str) -> Compose:
    cfg = PreprocessCfg(size=size, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize_mode)
    return image_transform_v2(cfg, is_train=False)


def main() -> None:
    pictures = make_pictures()
    transforms = {f"openai {size}": openai_transform(size) for size in SIZES}
    for interpolation in ("bicubic", "bilinear"):
        for mode in ("shortest", "squash"):
            transforms[f"open_clip {interpolation} {mode} 97"] = open_clip_transform(97, interpolation, mode)
    digests: dict[str, dict[str, str]] = {}
    for name, transform in transforms.items():
        digests[name] = {}
        for kind, data in pictures.items():
            try:
                result = transform(Image.open(io.BytesIO(data)))
                digests[name][kind] = hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest()
            except Exception as error:  # what theirs raises is the fact to be stored
                digests[name][kind] = f"raises {type(error).__name__}: {str(error)[:80]}"
                print(name, kind, digests[name][kind])
    versions = f"torchvision {torchvision.__version__}, open_clip {open_clip.__version__}, Pillow {PIL.__version__}"
    record = {
        "made_by": versions,
        "pictures": {kind: base64.b64encode(data).decode() for kind, data in pictures.items()},
        "digests": digests,
    }
    OUT.write_bytes(lzma.compress(json.dumps(record, sort_keys=True).encode()))
    print(f"{OUT.name}: {len(pictures)} pictures, {len(transforms)} transforms, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
