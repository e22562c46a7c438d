"""Where the parts of the project lie; the tests share it."""
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PACKAGE = ROOT / "diffusion_workers"

# The order of the modules: each may import those above it, and no other.
MODULE_ORDER = (
    "results", "guarded_fetch", "images", "image_metadata", "manifest", "manifest_files", "model_store",
    "controlnet", "control_detectors", "addon_planning", "acceleration_planning", "planning", "weight_storage",
    "component_loading", "control_nets", "tiny_models", "pipeline_factory", "lora_keys", "lora_files", "lora", "step_cache", "encoder_cache", "denoiser_runs", "compilation", "acceleration",
    "previews", "rendering", "batching", "memory_relief", "diffusion_service",
    "shapes", "shapes_text", "training_loop", "shapes_training", "shapes_sdxl", "shapes_flux", "shapes_denoising",
    "shapes_controls", "shapes_control_training", "shapes_loras", "shapes_family",
    "shapes_evaluation", "shapes_cells", "benchmark", "bench_command",
    "server_settings", "jobs", "server_gate", "server_metrics", "server_routes", "server", "serving",
    "worker_settings", "delivery", "worker_sdxl", "startup", "handler", "worker_command", "sweep_folder", "sweep", "ray_sweep",
    "mask_canvas", "picture_elements", "busy_clicks", "panel_runs", "reuse", "picture_history", "request_form", "addon_forms", "panel_stage", "grids",
    "control_panel", "widgets", "remote_cli", "cli",
)

# What may stand at the top level.
TOP_LEVEL = {
    "nbs", "diffusion_workers", "openapi", "web_gen_client", "tests", ".ci", ".runpod",
    "settings.ini", "setup.py", "_quarto.yml", "Dockerfile", "README.md", "CHANGELOG.md", "LICENSE",
    "build.sh", "run_server.sh", "pytest.ini", "MANIFEST.in", ".gitignore", ".gitattributes", ".dockerignore",
}


def notebooks() -> list[Path]:
    "Every notebook, without the copies that tools keep in hidden and underscored folders."
    return sorted(
        path for path in NBS.rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)
    )


def name(path: Path) -> str:
    "The path as a reader of the repository knows it."
    return path.relative_to(ROOT).as_posix()
