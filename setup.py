"""Builds the distribution from settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
LICENSES = {"apache2": "Apache-2.0"}
STATUSES = {"3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}


def read_settings() -> dict[str, str]:
    "The values of settings.ini, with its %(references)s filled in."
    parser = ConfigParser(delimiters=["="])
    parser.read(HERE / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def lines(value: str) -> list[str]:
    "One entry for each line that holds something."
    return [line.strip() for line in value.splitlines() if line.strip()]


settings = read_settings()

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    url=settings["git_url"],
    license=LICENSES[settings["license"]],
    classifiers=[
        f"Development Status :: {STATUSES[settings['status']]}",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["diffusion_workers", "diffusion_workers.*"]),
    package_data={
        "diffusion_workers": ["model_loading/*.yaml", "builtin_models/**", "test_inputs/*.json", "web/**", "elements/*"]
    },
    install_requires=lines(settings["requirements"]),
    extras_require={
        extra: lines(settings[f"{extra}_requirements"])
        for extra in ("controlnet", "notebook", "quantization", "ray", "voila", "worker", "dev")
    },
    entry_points={
        "console_scripts": lines(settings["console_scripts"]),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
