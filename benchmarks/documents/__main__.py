"""Write the tables of the documents from committed results and from counting.

python -m benchmarks.documents            all of them
python -m benchmarks.documents serving    those of one module of this folder
"""

import argparse
from importlib import import_module

NAMES = (
    "complexity", "dual", "efficiency", "evaluation", "generator", "gpu", "image", "kernel", "linear",
    "model", "ratio", "readme", "scorer", "serving",
)  # fmt: skip


def main() -> None:
    """Replace the tables in place."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}")
    names = parser.parse_args().names
    if unknown := set(names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: expected any of {', '.join(NAMES)}")
    for name in names or NAMES:
        module = import_module(f"benchmarks.documents.{name}")
        before = module.DOCUMENT.read_text(encoding="utf-8")
        after = module.filled(before)
        if after != before:
            module.DOCUMENT.write_text(after, encoding="utf-8")
        print(f"{name}: {module.DOCUMENT.name} {'updated' if after != before else 'is up to date'}")


if __name__ == "__main__":
    main()
