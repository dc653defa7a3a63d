"""A plan in memory: its arena, and its launches as calls of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lgcnet_fast.deploy.arena import Schedule, allocate, schedule
from lgcnet_fast.deploy.argmax import argmax_labels
from lgcnet_fast.deploy.operations import Size
from lgcnet_fast.deploy.packing import has_matrix_units
from lgcnet_fast.deploy.plan import Buffer, Launch, Plan, Pool, Stem, Tile
from lgcnet_fast.errors import BackendError
from lgcnet_fast.ops import tuning

if TYPE_CHECKING:
    from lgcnet_fast.kernels.infer_tile import MapView
    from lgcnet_fast.kernels.infer_tile_config import TileConfig

Call = Callable[[], object]


class FusedNetwork:
    """From images in `image` to logits and labels, on one device.

    `image` is uint8 (N, H, W, 3), or float32 in 0..255 where images are resized beforehand. The
    maps live in one arena and are overwritten by the next images: one thread at a time.
    `configs` overrides the tiles of launches, by name.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        image_dtype: torch.dtype = torch.uint8,
        configs: dict[str, TileConfig] | None = None,
    ) -> None:
        self.plan = plan
        self.schedule: Schedule = schedule(plan.launches)
        arena = allocate(plan, self.schedule)
        self.arena = torch.empty(arena.size, dtype=torch.uint8, device=device)
        self._offsets = arena.offsets
        self._configs = configs or {}
        shape = (plan.batch, *plan.size, 3)
        self.image = torch.zeros(shape, dtype=image_dtype, device=device)
        self.calls: tuple[Call, ...] = tuple(self._call(launch) for launch in plan.launches)

    @property
    def size(self) -> Size:
        return self.plan.size

    def run(self) -> None:
        """All launches, one after another on the current stream."""
        for call in self.calls:
            call()

    def logits(self) -> Tensor:
        """(N, classes, h, w), a view of the arena."""
        plan, output = self.plan, self.plan.output
        data = self._data(output)
        if output.class_rows:
            rows = data.view(plan.batch, output.height, output.channels, output.pitch)
            return rows[..., : output.width].transpose(1, 2)
        maps = data.view(plan.batch, *output.size, output.pitch)
        return maps[..., : output.channels].permute(0, 3, 1, 2)

    def write_labels(self, labels: Tensor) -> None:
        """The argmax at the size of `labels`, uint8 (N, H, W), contiguous."""
        plan, output = self.plan, self.plan.output
        if not output.class_rows:
            size: Size = (labels.shape[1], labels.shape[2])
            labels.copy_(argmax_labels(self.logits().float(), size))
            return
        from lgcnet_fast.kernels.upsample_argmax import argmax_of_rows

        rows = self._data(output).view(plan.batch, output.height, output.channels, output.pitch)
        argmax_of_rows(rows, output.width, labels)

    @property
    def matrix_units(self) -> bool:
        """Whether products run on tensor cores."""
        return has_matrix_units(self.arena.device, self.plan.dtype)

    def tile_config(self, tile: Tile) -> TileConfig:
        """That given for the launch, else the tuned one of the device, else the default.

        Raises `BackendError` for a tuned one that is compiled wrongly.
        """
        from lgcnet_fast.kernels.infer_tile_config import TileConfig

        if tile.name in self._configs:
            return self._configs[tile.name]
        height, width = tile.out.size
        pixels = self.plan.batch * height * width
        kinds = {term.kind for term in tile.terms}
        products = [product.out.channels for product in tile.products]
        default = TileConfig.default(pixels, tile.out.channels, self.matrix_units, kinds, products)
        key = self.plan.key_of(tile)
        config = tuning.tuned(default, "infer_tile", key, self.arena.device)
        if config != default and config.is_miscompiled(self.matrix_units):
            raise BackendError(
                f"tuning table: configs.infer_tile.{key}: {config} is compiled wrongly by Triton; "
                "measure anew: python -m lgcnet_fast.deploy.tune"
            )
        return config

    def _call(self, launch: Launch) -> Call:
        if isinstance(launch, Stem):
            return self._stem(launch)
        if isinstance(launch, Tile):
            return self.tile_call(launch, self.tile_config(launch))
        return self._pool(launch)

    def _stem(self, stem: Stem) -> Call:
        from lgcnet_fast.kernels.infer_stem import run_stem

        out = self._view(stem.out)
        return partial(
            run_stem, self.image, stem.weight, stem.bias, stem.mean, out, stem.stride, stem.relu
        )

    def tile_call(self, tile: Tile, config: TileConfig) -> Call:
        """The launch of a node with this tile."""
        from lgcnet_fast.kernels.infer_tile import TileProduct, TileTerm, run_tile

        terms = [
            TileTerm(
                term.kind,
                self._view(term.source),
                term.weight,
                term.depthwise,
                term.stride,
                term.dilation,
                term.side,
                term.relu,
            )
            for term in tile.terms
        ]
        products = [
            TileProduct(
                tuple(self._view(part) for part in product.parts),
                product.weight,
                product.bias,
                self._view(product.out),
            )
            for product in tile.products
        ]
        return partial(
            run_tile,
            terms,
            tile.bias,
            self._view(tile.out) if tile.stored else None,
            products,
            tile.out.size,
            self.plan.batch,
            self.plan.dtype,
            config,
            tile.relu_out,
        )

    def written_by(self, tile: Tile) -> list[Tensor]:
        """The memory of the maps that a launch writes, one-dimensional."""
        return [self._data(buffer) for buffer in tile.writes]

    def _pool(self, pool: Pool) -> Call:
        from lgcnet_fast.kernels.infer_pool import run_pool_product, run_pool_sums

        batch, bins, sums = self.plan.batch, pool.out.height, pool.partial
        partial_sums = self._data(sums).view(batch, bins * bins, sums.strips, sums.channels)
        sources = [self._view(source) for source in pool.sources]
        out = self._view(pool.out)

        def call() -> None:
            first = 0
            for source in sources:
                run_pool_sums(source, batch, bins, partial_sums, first)
                first += source.channels
            run_pool_product(partial_sums, pool.sources[0].size, pool.weight, pool.bias, out)

        return call

    def _view(self, buffer: Buffer) -> MapView:
        from lgcnet_fast.kernels.infer_tile import MapView

        return MapView(
            self._data(buffer),
            buffer.height,
            buffer.width,
            buffer.channels,
            buffer.pitch,
            buffer.class_rows,
        )

    def _data(self, buffer: Buffer) -> Tensor:
        """One-dimensional, within the arena."""
        start = self._offsets[buffer]
        dtype = torch.float32 if buffer.is_float32 else self.plan.dtype
        return self.arena[start : start + self.plan.bytes_of(buffer)].view(dtype)
