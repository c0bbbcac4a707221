"""One way to write weights, and the proof that they were written."""

from pathlib import Path

from safetensors import safe_open

from mdpo.types import UserError


def check_saved(folder: str | Path, expected: dict[str, int]) -> None:
    """Reads the headers of the safetensors files in `folder`: every parameter of `expected` (name -> elements) has to
    be there, whole. A sharded model written rank by rank leaves empty tensors behind that only fail at loading.
    Raises UserError naming the first few."""
    folder, found = Path(folder), {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tensors.get_slice(name).get_shape()
                found[name] = 1
                for n in shape:
                    found[name] *= n
    wrong = [name for name, n in expected.items() if found.get(name) != n]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} of {len(expected)} weights were not written whole, such as {wrong[0]}. "
            "Under ZeRO-3 the accelerate file needs zero3_save_16bit_model: true."
        )


def expected_weights(model) -> dict[str, int]:
    """Name and number of elements of every weight that a checkpoint of `model` has to hold; tied weights once. Sizes
    under ZeRO-3 are the whole parameter's."""

    def size(p):
        return p.ds_numel if hasattr(p, "ds_numel") else p.numel()

    if hasattr(model, "peft_config"):
        # Names in an adapter file leave the adapter's name out.
        named = {n: p for n, p in model.named_parameters() if ".default" in n}
        return {n.replace(".default", ""): size(p) for n, p in named.items() if "modules_to_save" not in n}
    return {name: size(p) for name, p in model.named_parameters()}
