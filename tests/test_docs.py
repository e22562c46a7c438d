"""The documentation site: reference generated from the code, links, diagrams, and builds that stop at broken links."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
from project import NBS, ROOT

sys.path.insert(0, str(ROOT / ".ci"))
import docs_site
import reference


@pytest.mark.parametrize(
    "page, names",
    [
        ("environment.md", ["`DIFFUSION_WORKERS_MODELS`", "`HF_HUB_OFFLINE`", "`BUCKET_NAME`"]),
        ("command-line.md", ["## generate", "`--use-karras-sigmas`", "`--print-completion`", "`--test_input`"]),
        ("manifest.md", ["## ModelManifest", "`class`", "## MemorySettings", "`bitsandbytes_4bit`", "## Profile"]),
        ("request.md", ["## GenerationRequest", "`inpaint.mask_blur`", "## ControlNetUnit", "`conditioning_scale`"]),
    ],
)
def test_the_reference_lists_what_the_code_reads(page: str, names: list[str]) -> None:
    text = reference.PAGES[page]()
    assert [name for name in names if name not in text] == []
    assert "| |\n" not in text, "a row without a description"


def test_a_missing_description_stops_the_build() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--fast")
    with pytest.raises(SystemExit, match="reference of paint: `--fast` has no description"):
        reference.table("paint", ["option", "value", "what it does"], reference.option_rows(parser))


@pytest.mark.parametrize(
    "link, on_site",
    [
        ("[a](../10_request/index.ipynb)", "[a](../10_request/index.md)"),
        ("[a](02_files.ipynb#reading)", "[a](02_files.md#reading)"),
        ("![a](../readme_files/panel.png)", "![a](../readme_files/panel.png)"),
        ("[a](../../CHANGELOG.md)", "[a](../CHANGELOG.md)"),
        ("[a](../../docs/how-to/offline.md)", "[a](../how-to/offline.md)"),
        ("[a](https://example.org/x.ipynb)", "[a](https://example.org/x.ipynb)"),
        ("[a](#here)", "[a](#here)"),
        ("```\n[a](02_files.ipynb)\n```", "```\n[a](02_files.ipynb)\n```"),
    ],
)
def test_notebook_links_become_site_links(link: str, on_site: str) -> None:
    assert docs_site.with_site_links(link, NBS / "20_models" / "01_manifest.ipynb") == on_site


def test_links_to_other_files_point_to_the_repository() -> None:
    found = docs_site.with_site_links("[a](../LICENSE)", NBS / "index.ipynb")
    assert found.startswith("[a](https://") and found.endswith("/blob/main/LICENSE)")
    with pytest.raises(SystemExit, match=r"the link to \.\./NOTHING leads nowhere"):
        docs_site.with_site_links("[a](../NOTHING)", NBS / "index.ipynb")


def test_mermaid_blocks_become_pre_elements() -> None:
    found = docs_site.with_diagrams("a\n\n```mermaid\nflowchart LR\n  a --> b\n```\n\n```python\n1\n```")
    assert '<pre class="mermaid">\nflowchart LR\n  a --&gt; b\n</pre>' in found and "```python" in found


@pytest.mark.slow
def test_the_site_builds_and_broken_links_stop_the_build(tmp_path: Path) -> None:
    "The whole site; then one page with a broken link, and one with a broken anchor."
    done = subprocess.run([str(ROOT / "build.sh"), "docs", str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = (tmp_path / "site" / "reference" / "environment" / "index.html").read_text(encoding="utf-8")
    assert "DIFFUSION_WORKERS_MODELS" in found
    for link in ("nowhere.md", "index.md#nowhere"):
        (tmp_path / "few").mkdir(exist_ok=True)
        (tmp_path / "few" / "index.md").write_text(f"# Home\n\n[broken]({link})\n")
        config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8") + f"docs_dir: {tmp_path / 'few'}\n"
        (tmp_path / "mkdocs.yml").write_text(config)
        built = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "-f", "mkdocs.yml"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert built.returncode != 0 and "nowhere" in built.stderr, built.stderr
