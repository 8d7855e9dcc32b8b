"""Packaging from settings.ini, the one place where names, version and requirements stand."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini")
cfg = config["DEFAULT"]
extras = {key.removesuffix("_requirements"): value.split()
          for key, value in cfg.items() if key.endswith("_requirements")}
home = f"https://github.com/{cfg['user']}/{cfg['repo']}"
classifiers = [
    "Development Status :: 4 - Beta",
    "Framework :: Jupyter",
    "Intended Audience :: Education",
    "Intended Audience :: Science/Research",
    "Operating System :: POSIX :: Linux",
    "Programming Language :: Python :: 3.11",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Topic :: Scientific/Engineering :: Image Recognition",
    "Typing :: Typed",
]


class BuildWithLedger(build_py):
    """Puts the ledger beside the modules, so that `facebook-nb results` works without the repository."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "facebook_nb" / "results"
            target.mkdir(parents=True, exist_ok=True)
            for path in Path("nbs/results").glob("*.json"):
                self.copy_file(str(path), str(target / path.name))


setup(
    cmdclass={"build_py": BuildWithLedger},
    name=cfg["lib_name"], version=cfg["version"], author=cfg["author"], description=cfg["description"],
    long_description=Path("README.md").read_text(), long_description_content_type="text/markdown",
    project_urls={"Source": home, "Issues": f"{home}/issues", "Changes": f"{home}/blob/{cfg['branch']}/CHANGELOG.md"},
    license=cfg["license"], license_files=["LICENSE"], keywords=cfg["keywords"].split(), classifiers=classifiers,
    python_requires=f">={cfg['min_python']}", packages=find_packages(include=["facebook_nb*"]),
    package_data={"facebook_nb": ["py.typed", "weights/*"]}, install_requires=cfg["requirements"].split(),
    extras_require=extras, entry_points={"console_scripts": cfg["console_scripts"].split()}, zip_safe=False,
)
