"""Package layout. Metadata, dependencies and tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["cat_fast", "cat_fast.*"]),
        "cat_fast.kernels",
        *(f"cat_fast.kernels.{name}" for name in find_packages("kernels")),
        "cat_fast.configs",
    ],
    package_dir={"cat_fast.kernels": "kernels", "cat_fast.configs": "configs"},
)
