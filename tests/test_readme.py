"""The generator of README.md, run on notebooks written by the tests."""

import importlib.util
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from project import ROOT

ONE_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg=="


@pytest.fixture
def readme(tmp_path, monkeypatch) -> ModuleType:
    "The script as a module that works on a project in a temporary folder."
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "nbs").mkdir()
    return module


def make(readme: ModuleType, *cells: nbformat.NotebookNode) -> dict[str, bytes]:
    nbformat.write(new_notebook(cells=list(cells)), readme.ROOT / readme.INDEX)
    return readme.readme_files()


def test_hidden_cells_and_directives_are_dropped(readme: ModuleType) -> None:
    text = make(readme, new_code_cell("#| hide\nsecret = 1"), new_code_cell("#| eval: false\nshown = 1"))[
        "README.md"
    ].decode()
    assert "secret" not in text and "#|" not in text
    assert "```python\nshown = 1\n```" in text


def test_links_are_rewritten_for_the_repository_root(readme: ModuleType) -> None:
    cell = new_markdown_cell("[a](00_a.ipynb) [b](../LICENSE) [c](https://example.org/x) [d](#part)")
    text = make(readme, cell)["README.md"].decode()
    assert "[a](nbs/00_a.ipynb) [b](LICENSE) [c](https://example.org/x) [d](#part)" in text


@pytest.mark.parametrize(
    "data", [{"image/png": ONE_PIXEL}, {"text/html": f'<img src="data:image/png;base64,{ONE_PIXEL}">'}]
)
def test_images_become_files(readme: ModuleType, data: dict[str, str]) -> None:
    files = make(readme, new_code_cell("show()", outputs=[new_output("display_data", data=data)]))
    (image,) = set(files) - {"README.md"}
    assert image in files["README.md"].decode() and files[image].startswith(b"\x89PNG")


def test_manual_edits_are_detected_and_stale_images_removed(readme: ModuleType) -> None:
    outputs = [new_output("display_data", data={"image/png": ONE_PIXEL})]
    made = make(readme, new_code_cell("show()", outputs=outputs))
    readme.write(made, readme.present_files())
    assert readme.present_files() == made
    (readme.ROOT / "README.md").write_text("edited by hand")
    assert readme.present_files() != made
    fewer = make(readme, new_markdown_cell("# No image"))
    readme.write(fewer, readme.present_files())
    assert readme.present_files() == fewer
