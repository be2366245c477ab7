"""Multi-scale deformable attention: one operator, its compiled kernels and its layer. Importing compiles nothing."""

from .module import MSDeformAttn
from .ms_deform_attn import ms_deform_attn
from .selection import active_backend, backends, cpu_isas, set_backend

__all__ = ["MSDeformAttn", "active_backend", "backends", "cpu_isas", "ms_deform_attn", "set_backend"]
