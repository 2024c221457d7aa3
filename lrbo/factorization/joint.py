"""What the layers of an attention or MLP can become together: fewer neurons, or nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lrbo.calibration.statistics import Statistic
from lrbo.errors import StatisticsError
from lrbo.factorization.prediction import PREDICTION_SHRINKAGE, shrunk
from lrbo.layers.joint import SkippedLinear, ThinLinear
from lrbo.layers.joint_form import Neurons, Skip
from lrbo.layers.low_rank import Bias, linear_of
from lrbo.layers.options import Losses, Option, Section
from lrbo.linalg import psd_cholesky, require_finite
from lrbo.models.model_map import linear_bias, linear_weight
from lrbo.models.specs import LayerSpec

NEEDS = frozenset({Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.OUTPUT_GRADIENT})
NEURONS, SKIP = Option(Neurons.name), Option(Skip.name)  # the families
RIDGE = 1e-3  # of each neuron's own second moment, added to it: of few tokens moments are singular
PANEL = 32  # neurons that are removed before all that is left is corrected

Statistics = Mapping[Statistic, Tensor]


@dataclass(frozen=True)
class Refit:
    """The weights that do best of a layer that reads the first ``k`` neurons, for every ``k``.

    They are ``product[:, :k] @ inv(root[:k, :k])``, a prefix like any rank of factors.

    Attributes:
        product: The weight times ``root``.
        root: Lower Cholesky factor of the second moment of the neurons, in their order.
        offset: What is added if all neurons are at ``center``: with a bias of its own, the mean
            output; or ``None``.
        center: The mean of the neurons, in their order; or ``None``.
    """

    product: Float[Tensor, "out n"]
    root: Float[Tensor, "n n"]
    offset: Bias = None
    center: Float[Tensor, " n"] | None = None

    def layer(self, count: int, dtype: torch.dtype) -> tuple[Tensor, Bias]:
        """Return weight and bias for the first neurons, rounded to a dtype."""
        product, root = self.product[:, :count], self.root[:count, :count]
        weight: Tensor = torch.linalg.solve_triangular(root, product, upper=False, left=False)
        if self.offset is None or self.center is None:
            return weight.to(dtype), None
        return weight.to(dtype), (self.offset - weight @ self.center[:count]).to(dtype)

    def only(self, count: int, device: torch.device) -> Refit:
        """Return a copy for the first neurons elsewhere."""
        return Refit(
            self.product[:, :count].to(device, copy=True),
            self.root[:count, :count].to(device, copy=True),
            None if self.offset is None else self.offset.to(device),
            None if self.center is None else self.center[:count].to(device),
        )

    def single(self) -> Refit:
        """Return a copy in float32 on the CPU, as it is kept."""
        return Refit(**{name: each.float().cpu() for name, each in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        return {name: each.contiguous() for name, each in vars(self).items() if each is not None}


@dataclass(frozen=True)
class Thinned:
    """A layer of an MLP, for every number of neurons at once.

    Attributes:
        order: The neurons, those that are kept longest first.
        loss: Predicted increase of the model's loss with the first 0, 1, ..., n neurons, nats per
            token, float64, of the layer that ends the MLP; zeros of the others.
        refit: Of the layer that ends the MLP; the others keep rows of their weights.
        dense: The layer of the model, whose rows are kept, once it is bound.
    """

    order: Int[Tensor, " n"]
    loss: Float[Tensor, " n_plus_1"]
    refit: Refit | None
    dense: nn.Module | None = None

    def losses(self, section: Section) -> Losses:
        """Return the predicted losses of some numbers of neurons."""
        losses: Losses = self.loss.numpy().astype(np.float64)[section.levels[:, 0]]
        return losses

    def module(self, option: Option, dtype: torch.dtype | None = None) -> ThinLinear:
        """Return the layer with some neurons, by default in the dtype of the dense one."""
        (count,) = option.level
        if not 1 <= count <= len(self.order):
            raise ValueError(f"{count} neurons are outside 1..{len(self.order)}.")
        dense = _bound(self.dense)
        weight, bias = linear_weight(dense), linear_bias(dense)
        dtype = dtype or weight.dtype
        if self.refit is not None:
            return linear_of(*self.refit.layer(count, dtype), ThinLinear)
        # Where gate and up are one layer, it has all gates first.
        starts = torch.arange(0, len(weight), len(self.loss) - 1, device=weight.device)
        rows = (starts[:, None] + self.order[:count].to(weight.device)).flatten()
        bias = None if bias is None else bias[rows].to(dtype)
        return linear_of(weight[rows].to(dtype), bias, ThinLinear)

    def only(self, count: int, device: torch.device) -> Thinned:
        """Return a copy of the first neurons elsewhere; a refit stays in float32."""
        refit = None if self.refit is None else self.refit.only(count, device)
        return replace(self, order=self.order[:count].to(device), refit=refit)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        parts = {"order": self.order, "loss": self.loss}
        return parts | ({} if self.refit is None else self.refit.tensors())

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Thinned:
        """Read what :meth:`tensors` gave; ValueError if shapes do not fit each other."""
        parts, count = dict(tensors), len(tensors["order"])
        shapes = {"loss": (count + 1,), "root": (count, count), "center": (count,)}
        _require_shapes(parts, shapes)
        order, loss = parts.pop("order"), parts.pop("loss")
        return cls(order, loss, Refit(**parts) if parts else None)


@dataclass(frozen=True)
class Skipped:
    """A layer of an attention or MLP that is not run.

    Attributes:
        loss: Predicted increase of the model's loss, nats per token, float64, ``(1,)``, of the
            layer that ends the part; zero of the others.
        whole: Whether the module that the layer is a part of is not run either: an attention.
        mean: What the layer that ends the part gives on average; ``None`` of the others.
        dense: The layer of the model, once it is bound.
    """

    loss: Float[Tensor, " one"]
    whole: bool
    mean: Bias
    dense: nn.Module | None = None

    def losses(self, section: Section) -> Losses:
        """Return the predicted loss."""
        del section
        losses: Losses = self.loss.numpy().astype(np.float64)
        return losses

    def module(self, option: Option, dtype: torch.dtype | None = None) -> SkippedLinear:
        """Return the layer that is not run, by default in the dtype of the dense one."""
        del option
        weight = linear_weight(_bound(self.dense))
        rows, columns = weight.shape
        dtype = dtype or weight.dtype
        mean = None if self.mean is None else self.mean.to(weight.device, dtype)
        like = weight.new_empty(0, dtype=dtype)
        return SkippedLinear((rows, columns), mean, like, whole=self.whole)

    def only(self, count: int, device: torch.device) -> Skipped:
        """Return the layer itself, which has no numbers to choose from."""
        del count, device
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the cache."""
        parts = {"loss": self.loss, "whole": torch.tensor([self.whole])}
        return parts | ({} if self.mean is None else {"mean": self.mean})

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> Skipped:
        """Read what :meth:`tensors` gave; ValueError if a shape cannot be."""
        _require_shapes(tensors, {"loss": (1,), "whole": (1,)})
        return cls(tensors["loss"], bool(tensors["whole"]), tensors.get("mean"))


JOINT: Mapping[Option, type[Thinned | Skipped]] = {NEURONS: Thinned, SKIP: Skipped}


def _require_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for part, shape in shapes.items():
        if part in tensors and tuple(tensors[part].shape) != shape:
            raise ValueError(f"{part} has shape {tuple(tensors[part].shape)}, expected {shape}")


def _bound(dense: nn.Module | None) -> nn.Module:
    if dense is None:
        raise ValueError("joint options need the layer of the model: bind it first.")
    return dense


def prepare_joint(
    forms: Collection[str],
    specs: Sequence[LayerSpec],
    last: nn.Module,
    statistics: Statistics,
    work: torch.device,
) -> dict[str, dict[Option, Thinned | Skipped]]:
    """Prepare what the layers of an attention or MLP can become together.

    Neurons are removed one by one, always the one that costs least in ``1/2 tr(G D C D^T)`` with
    the layer that reads them solved again for those that are left; ``C`` is their second moment,
    or where that layer has a bias, which then keeps the mean output, their covariance.

    Args:
        forms: Names of joint forms.
        specs: Of all layers of the part.
        last: The one that ends it.
        statistics: Of that one.
        work: Where to decompose.

    Returns:
        By layer name and family; float32 on the CPU.

    Raises:
        StatisticsError: If a statistic is missing, or is not finite.
    """
    if missing := sorted(need.value for need in NEEDS - set(statistics)):
        raise StatisticsError(
            f"{' and '.join(forms)} need the statistics {', '.join(missing)}. Calibrate with loss "
            "curves (sensitivity.enabled=true)."
        )
    weight, bias = linear_weight(last).to(work, torch.float64), linear_bias(last)
    mean, covariance, gradient = (
        statistics[each].to(work, torch.float64)
        for each in (Statistic.INPUT_MEAN, Statistic.INPUT_COVARIANCE, Statistic.OUTPUT_GRADIENT)
    )
    for name, tensor in (("weight", weight), ("covariance", covariance), ("gradient", gradient)):
        require_finite(name, tensor)
    gradient = shrunk(gradient, PREDICTION_SHRINKAGE)
    output = weight @ mean + (0.0 if bias is None else bias.to(weight))
    made: dict[str, dict[Option, Thinned | Skipped]] = {spec.name: {} for spec in specs}
    if SKIP.form in forms:
        loss = ((weight @ covariance) * (gradient @ weight)).sum() / 2
        for spec in specs:
            ends = spec.is_closing
            own = loss if ends else torch.zeros_like(loss)
            made[spec.name][SKIP] = Skipped(
                own.clamp_min(0.0).reshape(1).cpu(),
                whole=not spec.neurons,
                mean=output.float().cpu() if ends else None,
            )
    if NEURONS.form in forms and specs[0].neurons:
        moment = covariance if bias is not None else covariance + mean.outer(mean)
        order, loss, refit = _thinned(weight, moment, gradient)
        if bias is not None:
            refit = replace(refit, offset=output, center=mean[order])
        for spec in specs:
            ends = spec.is_closing
            made[spec.name][NEURONS] = Thinned(
                order.int().cpu(),
                (loss if ends else torch.zeros_like(loss)).cpu(),
                refit.single() if ends else None,
            )
    return made


def _thinned(
    weight: Float[Tensor, "out n"], moment: Float[Tensor, "n n"], gradient: Float[Tensor, "out out"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n_plus_1"], Refit]:
    """Order neurons, and return the loss and the refit of every number of them."""
    diagonal = moment.diagonal()
    floor = 1e-9 * float(diagonal.mean()) or 1.0  # of neurons that were never active
    moment = moment + torch.diag(RIDGE * diagonal + floor)
    importance = weight.T @ gradient @ weight
    precision = torch.cholesky_inverse(psd_cholesky(moment, "second moment of the neurons"))
    order = removal_order(importance, precision).flip(0)
    root = psd_cholesky(moment[order][:, order], "second moment of the neurons")
    product = weight[:, order] @ root
    each = (product * (gradient @ product)).sum(0).clamp_min(0.0) / 2
    loss = torch.cat([each, each.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    return order, loss, Refit(product, root)


def removal_order(
    importance: Float[Tensor, "n n"], precision: Float[Tensor, "n n"]
) -> Int[Tensor, " n"]:
    r"""Order inputs of a layer by when they are removed, the cheapest at each step, exactly.

    With ``A = W^T G W`` and ``P = C^-1``, to remove input ``j`` and solve for the others costs
    ``A_jj / (2 P_jj)`` (optimal brain surgeon). The weights of the others then change by
    ``-w_j p_j^T / P_jj``, so that both matrices change by rank-1 products. These are gathered for
    ``PANEL`` steps, and then applied at once.

    Args:
        importance: ``A``, in float64.
        precision: ``P``, in float64.

    References:
        Hassibi, Stork and Wolff, *Optimal Brain Surgeon and General Network Pruning*, 1993.
    """
    left = torch.arange(len(precision), device=precision.device)
    removed: list[Tensor] = []
    while len(left):
        steps, count = min(PANEL, len(left)), len(left)
        scores, sizes = importance.diagonal().clone(), precision.diagonal().clone()
        alive = torch.ones(count, dtype=torch.bool, device=left.device)
        shared = precision.new_zeros(3, steps, count)  # what later panels are to be corrected by
        rows, changes, partners = shared
        for step in range(steps):
            costs = torch.where(alive, scores / sizes, torch.inf)
            index = costs.argmin()
            row = precision[index] - rows[:step, index] @ rows[:step]
            own = importance[index] - changes[:step, index] @ partners[:step]
            own -= partners[:step, index] @ changes[:step]
            change = row / row[index]
            partner = own - own[index] / 2 * change
            rows[step] = row / row[index].sqrt()
            changes[step], partners[step] = change, partner
            sizes -= rows[step].square()
            scores -= 2 * change * partner
            alive[index] = False
            removed.append(left[index])
        left = left[alive]
        rows, changes, partners = shared[:, :, alive]
        precision = precision[alive][:, alive].addmm_(rows.T, rows, alpha=-1.0)
        importance = importance[alive][:, alive].addmm_(changes.T, partners, alpha=-1.0)
        importance.addmm_(partners.T, changes, alpha=-1.0)
    return torch.stack(removed)
