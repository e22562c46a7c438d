"""Paths of the project, shared by the tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PACKAGE = ROOT / "diffusion_workers"

# Files and folders allowed at the top level.
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
    "All notebooks, except the copies that tools keep in hidden and underscored folders."
    return sorted(
        path
        for path in NBS.rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
    )


def name(path: Path) -> str:
    "The path relative to the repository root."
    return path.relative_to(ROOT).as_posix()
