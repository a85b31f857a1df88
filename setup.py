"""What pyproject.toml cannot say: the top-level recipes/ travel inside the package, as liftkit/recipes."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["liftkit*"]), "liftkit.recipes"],
    package_dir={"liftkit.recipes": "recipes"},
)
