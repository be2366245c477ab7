"""Training schemes whose steps never make the host wait for a GPU.

Two things do, once per step each: the NMS of the head `faster_rcnn`, and the number of decoder queries that are made of
the positives of auxiliary heads (`--lambda1` above 0).
"""

from tests.tiny import TWO_STAGE

_REFINED = f"{TWO_STAGE} --mixed_selection --look_forward_twice"
FLAGS = (
    "",
    "--no_aux_loss --num_feature_levels 1",
    f"{_REFINED} --num_queries_one2many 6 --k_one2many 2 --one2many_proposals own",
    f"{_REFINED} --num_queries_one2many 6 --k_one2many 2 --one2many_groups isolated --one2many_own heads",
    "--hybrid epoch --hybrid_k 2",
    "--hybrid layer --hybrid_k 2 --hybrid_layers 1",
    f"{_REFINED} --query_pos box --dn_number 100",
    f"{_REFINED} --query_pos box --dn_number 100 --no_aux_loss",
    "--lambda1 0 --aux_heads atss retinanet",
    "--lambda1 0 --aux_heads fcos gfl paa",
    "--matcher cost-greedy",
    "--matcher soft-literal",
    "--matcher soft --scg rounds --soft_extra_layers 1 --cls_target hard",
    f"{TWO_STAGE} --matcher soft --enc_matcher soft --probe_per_layer --layer_consistency last",
)
