"""Which model `--model` means: one that the cluster has, a GGUF file, or a well-known shape."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from peer.config import Config
from peer.errors import CommandError, ModelError
from peer.planning import families
from peer.planning.profile import ModelShape
from peer.words.basis import Basis, KnownModel


def model_of(text: str | None, basis: Basis, config: Config) -> KnownModel:
    """The model to plan for, with who holds which parts of it.

    text: of --model; None: the one of the plan, or the only one. Raises: CommandError (2).
    """
    if text is None:
        if basis.shape is not None:
            return KnownModel(basis.shape, basis.held)
        if len(basis.models) == 1:
            return basis.models[0]
        raise CommandError("which model is to be planned for?", _mend(basis.models), 2)
    if families.is_shape(text):
        try:
            return KnownModel(families.shape(text))
        except ValueError as error:
            raise CommandError(f"--model: {error}", exit_code=2) from None
    path = Path(text).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        return _same(shape_of_file(path, config), basis.models)
    named = [m for m in basis.models if m.shape.model == text]
    found = named or [m for m in basis.models if m.shape.model.startswith(text)]
    if len(found) != 1:
        many = ", ".join(sorted(m.shape.model for m in found))
        why = f"that could be {many}" if found else "no such model is here, and no such file"
        raise CommandError(f"--model {text}: {why}", _mend(basis.models), 2)
    return found[0]


def _mend(models: Sequence[KnownModel]) -> str:
    here = "".join(f"{name}, " for name in sorted({m.shape.model for m in models}))
    return f"--model with one of: {here}a GGUF file, or SIZE:QUANT such as 8B:q4_k_m"


def _same(shape: ModelShape, models: Sequence[KnownModel]) -> KnownModel:
    """The cluster's own where it has this model: who holds and measured it is known then."""
    for known in models:
        if replace(known.shape, digest=shape.digest, layer_kinds=shape.layer_kinds) == shape:
            return known
    return KnownModel(shape)


def shape_of_file(path: Path, config: Config) -> ModelShape:
    """A GGUF file's shape from its header alone, as this machine's engine understands it.

    Raises: CommandError, where it is no model or no engine is installed.
    """
    from peer.models.imports import import_head
    from peer.planning import survey

    engines = survey.backends_of(config)
    if not engines:
        raise CommandError(
            f"{path}: only an engine knows where a model may be cut, and none is installed here",
            f"{survey.with_engines()} in halka's environment, or --model 8B:q4_k_m",
        )
    with tempfile.TemporaryDirectory(prefix="halka-plan-") as root:
        try:
            folder = import_head(path, Path(root))
            return asyncio.run(survey.shape(survey.teller(engines), folder))
        except ModelError as error:
            raise CommandError(str(error), exit_code=2) from None
