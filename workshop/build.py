"""How the wheel is built: without the scripts in data/ and claims/, with what readers load."""

from setuptools.command.build_py import build_py


class WithoutScripts(build_py):
    "Of packages that hold data alone, `__init__.py` is the only module."

    def find_package_modules(self, package, package_dir):
        "(package, module, file) of what is installed."
        found = super().find_package_modules(package, package_dir)
        if package not in ("codebook_tutorial.data", "codebook_tutorial.recorded"):
            return found
        return [one for one in found if one[1] == "__init__"]
