"""How predictions err, as trials show: the weights under which they predict what was measured.

The same weights that a point of :class:`~lrbo.optimization.variables.WeightSpace` has, so that the
allocation of least corrected loss is that of a point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from lrbo.allocation.allocate import Allocation
from lrbo.optimization.variables import EXPONENT, WeightSpace

Floats = NDArray[np.float64]

# Standard deviations before any trial, of natural logarithms.
WEIGHT = 0.3  # of a variable of the space: predictions of a kind or form err by a third
SCALE = 1.0  # of the sum of all predictions
POWER = 0.3  # by which measured losses grow faster than predicted ones
NOISE = 0.02  # of a measured loss, beside what the weights explain


@dataclass(frozen=True)
class Correction:
    """The weights of a space, normally distributed about the most likely ones.

    Attributes:
        names: Of the variables.
        mean: The most likely weights, ``(n,)``.
        root: A square root of their covariance, ``(n, n)``.
        errors: Measured over predicted loss less one, with these weights, one of each trial.
    """

    names: tuple[str, ...]
    mean: Floats
    root: Floats
    errors: Floats

    @classmethod
    def of(cls, space: WeightSpace, trials: Sequence[tuple[Allocation, float]]) -> Correction:
        """Fit the weights to trials: allocations, with what each loses beyond the dense model.

        Their logarithms are ``a + b log sum_u exp(w_u) E_u ** exp(p)``, with the weight ``w_u`` of
        the option of a unit, a sum of variables, and its predicted loss ``E_u``. All parameters are
        normal beforehand; the posterior is Laplace's approximation.

        Raises:
            ValueError: If a loss is not positive.
        """
        if not trials or min(lost for _, lost in trials) <= 0:
            raise ValueError("expected trials that lose more than the dense model does.")
        names = space.names
        parts = [_coefficients(space, allocation) for allocation, _ in trials]
        measured = np.log([lost for _, lost in trials])
        power = names.index(EXPONENT) if EXPONENT in names else None
        start = np.zeros(len(names) + 2)
        spread = np.array([*[WEIGHT] * len(names), SCALE, POWER])

        def predicted(values: Floats) -> Floats:
            weights, scale, slope = values[: len(names)], values[-2], values[-1]
            exponent = 1.0 if power is None else np.exp(weights[power])
            sums = [np.logaddexp.reduce(own @ weights + exponent * logs) for own, logs in parts]
            return np.asarray(scale + np.exp(slope) * np.array(sums))

        def residuals(values: Floats) -> Floats:
            return np.concatenate([(predicted(values) - measured) / NOISE, values / spread])

        fitted = least_squares(residuals, start)
        information = fitted.jac.T @ fitted.jac
        covariance = np.linalg.inv(information)[: len(names), : len(names)]
        return cls(
            names,
            fitted.x[: len(names)],
            np.linalg.cholesky(covariance),
            np.expm1(measured - predicted(fitted.x)),
        )

    def draw(self, seed: int) -> Mapping[str, float]:
        """Return weights from the distribution."""
        normal = np.random.default_rng(seed).standard_normal(len(self.names))
        values = self.mean + self.root @ normal
        return dict(zip(self.names, values.tolist(), strict=True))


def _coefficients(space: WeightSpace, allocation: Allocation) -> tuple[Floats, Floats]:
    """Return how units depend on the variables, ``(units, variables)``, and logs of their losses.

    Units that lose nothing are left out.
    """
    rows, losses = [], []
    for name, own in space._coefficients.items():
        menu = space.problem.menus[name]
        assert menu.losses is not None
        index = menu.index(allocation.options[name])
        rows.append(own[index])
        losses.append(menu.losses[index])
    lost = np.array(losses)
    return np.stack(rows)[lost > 0], np.log(lost[lost > 0])
