"""``torch.export`` of the loss of a fake model; whatever it raises becomes one ModelError with the user's line."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from autopar.core.errors import ModelError
from autopar.graph.fake_tensors import FakeTensorFactory, with_fake_tensors
from autopar.workload import Workload, describe_user_error, guard_user_code

MODEL_PREFIX = "model"  # the attribute that holds the user's model in the exported wrapper


class LossModule(nn.Module):
    """The user's model followed by its loss: keyword inputs in, a scalar out."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, dict[str, Any]], Tensor] | None) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, **inputs: Any) -> Tensor:
        """The loss of one batch of keyword inputs, a scalar."""
        return scalar_loss(self.model(**inputs), self.loss_fn, inputs)


def scalar_loss(output: Any, loss_fn: Callable[[Any, dict[str, Any]], Tensor] | None, inputs: dict[str, Any]) -> Tensor:
    """``loss_fn(output, inputs)``, else ``output.loss`` or ``output["loss"]``, else the output itself; raises ModelError
    if that is not a scalar tensor."""
    if loss_fn is not None:
        loss, origin = loss_fn(output, inputs), "loss_fn"
    elif isinstance(getattr(output, "loss", None), Tensor):
        loss, origin = output.loss, "output.loss"
    elif isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
        loss, origin = output["loss"], "output['loss']"
    else:
        loss, origin = output, "the model's output"
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    actual = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise ModelError(
        f"no loss: {origin} is {actual}, not a scalar tensor\n"
        "  add `def loss_fn(output, inputs)` that returns a scalar to the model file, or pass labels to a model that "
        "computes its own loss"
    )


def export_loss(workload: Workload, model: nn.Module, batch_size: int, dtype: torch.dtype) -> ExportedProgram:
    """The pre-dispatch training graph of the loss at ``batch_size`` samples, parameters lifted to placeholders and
    stored in ``dtype``; raises ModelError where the model cannot be traced."""
    faker = FakeTensorFactory(dtype)
    inputs = faker.fake_inputs(workload.inputs(batch_size))
    with (
        with_fake_tensors(model, faker),
        _torch_muted(),
        guard_user_code("cannot trace the model:", reraised=(Exception,)),
    ):
        try:
            return torch.export.export(LossModule(model, workload.loss_fn), (), inputs, strict=False)
        except ModelError:
            raise
        except Exception as error:
            raise tracing_error(error) from error


def functionalized_by_torch(program: ExportedProgram) -> ExportedProgram:
    """The program without in-place ops, by torch's own pass, which re-runs the whole graph."""
    with _torch_muted():
        return program.run_decompositions({})


def is_data_dependent_error(error: BaseException) -> bool:
    """Whether an exception says that the elements of a tensor, unknown while tracing, were needed; such a model fails
    at every batch size."""
    text = str(error).lower()
    signs = ("data-dependent", "data dependent", "guardondatadependent", "dynamic_output_shape", "dynamicoutputshape")
    return isinstance(error, GuardOnDataDependentSymNode) or any(
        sign in text or sign in type(error).__name__.lower() for sign in signs
    )


def tracing_error(error: Exception) -> ModelError:
    """The ModelError for an exception raised while tracing."""
    while isinstance(error.__cause__, Exception) and not isinstance(error, GuardOnDataDependentSymNode):
        error = error.__cause__
    if is_data_dependent_error(error):
        return ModelError(
            "cannot trace the model: its control flow or a size depends on the values of a tensor\n"
            f"  {describe_user_error(_first_sentence(error))}\n"
            "  replace the `if`, `.item()`, `.tolist()`, `nonzero` or boolean indexing there by torch.where or a mask "
            "of a fixed size, or make the decision a setting of build_model"
        )
    return ModelError(
        f"cannot trace the model: {describe_user_error(error)}\n"
        "  the model must run in training mode on example_inputs(batch_size) for any batch size"
    )


def _first_sentence(error: Exception) -> Exception:
    """An exception of the same type name and traceback whose message is the first sentence of ``error``'s: torch adds a
    page of advice."""
    short = type(error.__class__.__name__, (Exception,), {})(str(error).strip().splitlines()[0].split(". ")[0])
    return short.with_traceback(error.__traceback__)


@contextmanager
def _torch_muted() -> Iterator[None]:
    """Mutes torch's own warnings and log lines about the export: our errors tell the user all there is to know."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
