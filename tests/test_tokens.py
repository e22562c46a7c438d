"Prompt tokens are not counted when files of the tokenizer are missing."

import logging
import shutil
from pathlib import Path

import pytest

from diffusion_workers.models.manifest import FolderSource, builtin_path
from diffusion_workers.models.store import find_manifest
from diffusion_workers.prompt.tokens import prompt_report
from ez_diffusion_client.models import PromptQuery

QUERY = PromptQuery(prompt="a red circle on a white background")


@pytest.mark.parametrize(("model", "part"), [("shapes-sd15", "tokenizer"), ("shapes-flux", "tokenizer_2")])
def test_tokenizer_without_vocabulary_is_ignored(
    model: str, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = find_manifest(model).model_copy(update={"source": FolderSource(folder=str(tmp_path))})
    source, folder = builtin_path(model) / part, tmp_path / part
    folder.mkdir()
    shutil.copy(source / "tokenizer_config.json", folder)
    with caplog.at_level(logging.INFO):
        assert prompt_report(QUERY, manifest).tokens is None
    assert f"{part} has no vocabulary" in caplog.text
    shutil.copytree(source, folder, dirs_exist_ok=True)  # the download is complete now
    assert prompt_report(QUERY, manifest).tokens == prompt_report(QUERY, find_manifest(model)).tokens > 0
