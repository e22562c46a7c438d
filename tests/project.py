"""Where the parts of the project are; the tests share it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PACKAGE = ROOT / "diffusion_workers"

# What may stand at the top level.
TOP_LEVEL = {
    "nbs",
    "diffusion_workers",
    "openapi",
    "web_gen_client",
    "tests",
    "docs",
    "mkdocs.yml",
    ".ci",
    ".runpod",
    "settings.ini",
    "setup.py",
    "_quarto.yml",
    "Dockerfile",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "build.sh",
    "run_server.sh",
    "pytest.ini",
    "MANIFEST.in",
    ".gitignore",
    ".gitattributes",
    ".dockerignore",
}


def notebooks() -> list[Path]:
    "Every notebook, without the copies that tools keep in hidden and underscored folders."
    return sorted(
        path
        for path in NBS.rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
    )


def name(path: Path) -> str:
    "The path as a reader of the repository knows it."
    return path.relative_to(ROOT).as_posix()
