"The progress bar of `generate`, and how failed calls are logged in a script."

import os
import subprocess
import sys

PROGRAM = """
from diffusion_workers import DiffusionService

service = DiffusionService(device="cpu")
print("first", file=__import__("sys").stderr)
service.generate("a green star", num_inference_steps=3, progress=True)
print("second", file=__import__("sys").stderr)
result = service.generate("a green star", num_inference_steps=3)
assert result.ok
print("third", file=__import__("sys").stderr)
failed = service.generate("a green star", width=130)
assert not failed.ok
"""


def test_progress_bar_is_opt_in_and_failures_are_logged() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    asked, default, failed = (done.stderr.partition(word)[2] for word in ("first", "second", "third"))
    asked = asked.partition("second")[0]
    default = default.partition("third")[0]
    assert "denoising" in asked and "3/3" in asked
    assert "denoising" not in default and "3/3" not in default
    assert failed.count("width") == 1 and "multiple of 8" in failed and "given 130" in failed
