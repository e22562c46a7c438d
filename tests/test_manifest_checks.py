"Validation of manifests: what is refused, and the error messages."

import pytest
from pydantic import ValidationError

from diffusion_workers.models.manifest import ModelManifest
from ez_diffusion_client.models import ModelKind, Task

FLUX = {"name": "flux", "family": "flux", "source": {"folder": "flux-dev"}}
EDGES = FLUX | {"name": "edges", "kind": "control", "control_preprocessors": ["canny"]}
REDUX = FLUX | {"name": "redux", "kind": "redux"}
GGUF = {
    "components": {
        "transformer": {
            "source": {"file": "flux-Q8_0.gguf", "config": {"folder": "flux-dev", "subfolder": "transformer"}}
        }
    }
}


def test_valid_manifests_are_accepted() -> None:
    assert ModelManifest.model_validate(EDGES).kind == ModelKind.control
    encoder = {"reference_encoder": {"source": {"folder": "redux-dev"}}}
    assert ModelManifest.model_validate(REDUX | encoder).tasks[-1] == Task.edit
    quantized = ModelManifest.model_validate(FLUX | GGUF | {"memory": {"offload": "model"}})
    sources = quantized.denoiser_source.describe(), quantized.source.describe()
    assert sources == ("file:flux-Q8_0.gguf", "folder:flux-dev")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fill"}, "is only for inpainting"),
        ({"family": "sdxl"}, "only flux has models of this kind"),
        ({"controlnets": {"a": {"source": {"folder": "a"}}}}, "takes no ControlNets"),
        ({"refiner": {"source": {"folder": "a"}}}, "has no refiner"),
        ({"reference_encoder": {"source": {"folder": "a"}}}, "only a model of the kind redux has one"),
        (REDUX, "a model of the kind redux needs one"),
        (REDUX | {"reference_encoder": {"source": {"file": "redux.safetensors"}}}, "it is a pipeline"),
    ],
)
def test_fields_that_do_not_fit_the_kind_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelManifest.model_validate(EDGES | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"memory": {"storage_dtype": "float8_e4m3fn", "quantization": "torchao_int8"}},
            "memory.storage_dtype: cannot be combined with quantization",
        ),
        (
            {"memory": {"offload": "group", "quantization": "torchao_int8"}},
            "memory.offload: quantized weights cannot be offloaded in groups",
        ),
        (
            {"source": {"file": "flux.safetensors"}, "memory": {"quantization": "torchao_int8"}},
            "memory.quantization: the denoiser is in a single file",
        ),
        (
            GGUF | {"memory": {"quantization": "torchao_int8"}},
            "memory.quantization: the weights of a .gguf file are quantized already",
        ),
        (GGUF | {"memory": {"storage_dtype": "float8_e5m2"}}, "memory.storage_dtype: the weights of a .gguf file"),
        (
            {"family": "sdxl", "memory": {"attention_backend": "flash"}},
            "memory.attention_backend: given 'flash'; only the transformer of flux",
        ),
        (
            {"source": {"file": "flux.gguf"}},
            "source.file: a .gguf file can only be transformer or text_encoder_2 of a model of Flux",
        ),
        ({"loras": {"ink": {"source": {"file": "ink.gguf"}}}}, "loras.ink.source.file: a .gguf file"),
        (
            {"embeddings": {"cat": {"source": {"hub": "a/b"}}}},
            "embeddings.cat.source: an embedding is read from a file",
        ),
        ({"components": {"vae": {"source": {"file": "vae.gguf"}}}}, "components.vae.source.file: a .gguf file"),
    ],
)
def test_unsupported_weight_files_and_memory_options_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelManifest.model_validate(FLUX | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"memory": {}}, True),
        ({"memory": {"vae_slicing": True}}, False),
        ({"wildcard_folders": [{"folder": "wildcards"}]}, False),
    ],
)
def test_checksum_depends_on_set_fields(change: dict, same: bool) -> None:
    plain = ModelManifest.model_validate(FLUX)
    assert (ModelManifest.model_validate(FLUX | change).sha256 == plain.sha256) is same
