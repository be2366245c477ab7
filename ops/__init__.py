"""Multi-scale deformable attention: its operators, their compiled kernels and its layer. Importing compiles nothing."""

from .fused import ms_deform_attn_fused, sampling_points
from .module import MSDeformAttn
from .ms_deform_attn import ms_deform_attn
from .selection import active_backend, backends, cpu_isas, set_backend, set_fused

__all__ = [
    "MSDeformAttn",
    "active_backend",
    "backends",
    "cpu_isas",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "sampling_points",
    "set_backend",
    "set_fused",
]
