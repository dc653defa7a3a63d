"""Operations as pure functions: contract, plain-PyTorch reference and choice of the backend."""

from lgcnet_fast.ops.average_pool import average_pool, average_pools
from lgcnet_fast.ops.backend import explain, set_backend, use_backend
from lgcnet_fast.ops.cast_together import cast_together, copies_together
from lgcnet_fast.ops.concat_pair import concat_pair
from lgcnet_fast.ops.concat_upsample import concat_upsample, sum_upsample, upsample
from lgcnet_fast.ops.concat_upsample_pointwise import concat_upsample_pointwise
from lgcnet_fast.ops.convolutions import Geometry, convolutions
from lgcnet_fast.ops.depthwise_separable import relu_depthwise_separable
from lgcnet_fast.ops.interleaved_convolution import interleaved_convolution
from lgcnet_fast.ops.max_pool import max_pool, max_pools
from lgcnet_fast.ops.mixed_norm_sum import mixed_norm_sum, norm_sum, normalised
from lgcnet_fast.ops.mixed_sum import mixed_sum
from lgcnet_fast.ops.packed_weights import packed_weights
from lgcnet_fast.ops.pair_readers import pair_readers
from lgcnet_fast.ops.products import Products
from lgcnet_fast.ops.readers import Readers, readers, rectified_together
from lgcnet_fast.ops.recompute import Recomputable, recomputable, recomputed, recomputes
from lgcnet_fast.ops.rectified_convolutions import rectified_convolutions
from lgcnet_fast.ops.rectified_deconvolution import rectified_deconvolution
from lgcnet_fast.ops.rectified_pointwise import rectified_pointwise
from lgcnet_fast.ops.running_statistics import gathered_running_statistics
from lgcnet_fast.ops.second_stages import second_stages
from lgcnet_fast.ops.separable_branches import separable_branches
from lgcnet_fast.ops.strided_convolutions import strided_convolutions
from lgcnet_fast.ops.upsample_loss import upsample_argmax, upsample_cross_entropy, upsample_ohem

__all__ = [
    "Geometry",
    "Products",
    "Readers",
    "Recomputable",
    "average_pool",
    "average_pools",
    "cast_together",
    "concat_pair",
    "concat_upsample",
    "concat_upsample_pointwise",
    "convolutions",
    "copies_together",
    "explain",
    "gathered_running_statistics",
    "interleaved_convolution",
    "max_pool",
    "max_pools",
    "mixed_norm_sum",
    "mixed_sum",
    "norm_sum",
    "normalised",
    "pair_readers",
    "packed_weights",
    "readers",
    "recomputable",
    "recomputed",
    "recomputes",
    "rectified_convolutions",
    "rectified_deconvolution",
    "rectified_pointwise",
    "rectified_together",
    "relu_depthwise_separable",
    "second_stages",
    "separable_branches",
    "set_backend",
    "strided_convolutions",
    "sum_upsample",
    "upsample",
    "upsample_argmax",
    "upsample_cross_entropy",
    "upsample_ohem",
    "use_backend",
]
