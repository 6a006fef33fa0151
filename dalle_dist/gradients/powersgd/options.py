"""What a user may choose of PowerSGD."""

from __future__ import annotations

from dataclasses import dataclass

from dalle_dist.choices import CommDtype, ErrorDtype, ProductFormat, values
from dalle_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PowerSGDOptions:
    """How PowerSGD sends and what it keeps; the keys of the config's section `parallel`.

    comm_dtype   number format of P and Q between nodes
    p_scale, q_scale   what P and Q are multiplied by, to lie well in a 16-bit format. P stays
                 scaled: the 1e-6 of the orthogonalisation is added to the scaled P
    error_dtype  number format of the error buffers
    warm_start   take the last Q', its columns scaled to those of a Gaussian, for the next Q
    refresh_every   before each step that it divides, Q becomes an orthonormal basis of the last Q',
                 at the scale of a Gaussian: one power iteration (after arXiv 2509.11254); 0: never
    products     number format of the factors of its products on GPUs: what "tf32" loses stays in
                 the error buffers, and P and Q go out in 16 bits anyway. Bases are orthonormal in
                 fp32 all the same
    start_step   average without compression before this step
    dense_every  at each step that it divides, average gradient + error without compression, which
                 empties the buffers; 0: never

    Raises:
        ConfigError: a value out of its range.
    """

    comm_dtype: CommDtype = "fp32"
    p_scale: float = 1.0
    q_scale: float = 1.0
    error_dtype: ErrorDtype = "fp32"
    warm_start: bool = False
    refresh_every: int = 0
    products: ProductFormat = "fp32"
    start_step: int = 0
    dense_every: int = 0

    def __post_init__(self) -> None:
        for name, formats in (
            ("comm_dtype", values(CommDtype)),
            ("error_dtype", values(ErrorDtype)),
            ("products", values(ProductFormat)),
        ):
            if getattr(self, name) not in formats:
                raise ConfigError(
                    f"parallel.{name}: '{getattr(self, name)}' is not one of {', '.join(formats)}"
                )
        for name in ("refresh_every", "start_step", "dense_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"parallel.{name}: {getattr(self, name)} is negative")

    @property
    def q_changes(self) -> bool:
        """Whether Q is more than its seed."""
        return self.warm_start or self.refresh_every > 0

    def refreshes(self, step: int) -> bool:
        """Whether Q becomes an orthonormal basis before this step."""
        return self.refresh_every > 0 and step % self.refresh_every == 0
