"""Every synchronous algorithm and every compressor, for the tests that run over all of them."""

from dataclasses import MISSING, fields

from mpicomp.algorithms import (
    ADPSGD,
    ALGORITHMS,
    ASGD,
    DCASGD,
    DEFATC,
    DGC,
    DPSGD,
    EFSGD,
    GMC,
    LEAD,
    SGD,
    SGP,
    SSGD,
    AdaGossip,
    Algorithm,
    AsynchronousAlgorithm,
    Choco,
    DCGossip,
    DeepSqueeze,
    DeMo,
    DiLoCo,
    EfficientAdam,
    FedAdamSSM,
    LocalSGD,
    MoTEF,
    NoLoCo,
    OneBitAdam,
    PowerGossip,
    PowerSGD,
    SketchedAMSGrad,
    SparseLoCo,
    StreamingDiLoCo,
)
from mpicomp.compression import COMPRESSORS as KINDS
from mpicomp.compression import (
    QSGD,
    BlockTopK,
    Cast,
    ErrorFeedback,
    HardThreshold,
    LogGrid,
    PerTensor,
    RandomBlock,
    RandomK,
    SampledTopK,
    SignNorm,
    TernGrad,
    TopK,
    UniformGrid,
)
from mpicomp.topology import RandomMatching, ring

COMPRESSORS = {
    # every kind as it is by default, if all its parameters have one; of the others, and of other values, examples
    **{kind: make() for kind, make in KINDS.items() if all(field.default is not MISSING for field in fields(make))},
    "topk": TopK(ratio=0.2),
    "topk_int8": TopK(ratio=0.2, values="int8"),
    "topk_per_tensor": PerTensor(TopK(ratio=0.2)),
    "topk_dense_1d": PerTensor(TopK(ratio=0.2), dense_1d=True),
    "block_topk": BlockTopK(ratio=0.2),
    "block_topk_statistical": BlockTopK(ratio=0.2, values="statistical"),
    "sampled_topk": SampledTopK(ratio=0.2),
    "randk_shared": RandomK(ratio=0.2),
    "randk_private": RandomK(ratio=0.2, shared=False),
    "threshold": HardThreshold(threshold=0.05),
    "block": RandomBlock(ratio=0.25),
    "block_per_tensor": PerTensor(RandomBlock(ratio=0.25)),
    "sign_per_tensor": PerTensor(SignNorm()),
    "qsgd": QSGD(bits=4, contractive=True),
    "terngrad": TernGrad(contractive=True),
    "log_grid_per_tensor": PerTensor(LogGrid(k=2)),
    "uniform_grid": UniformGrid(bits=4),
    "float16": Cast(dtype="float16"),
    "topk_error_feedback": ErrorFeedback(PerTensor(TopK(ratio=0.1))),
}

TOP = COMPRESSORS["topk"]

DETERMINISTIC = {
    "local_sgd": LocalSGD(period=2),
    "local_sgd_float16": LocalSGD(3, DPSGD(compressor=COMPRESSORS["float16"])),
    "local_sgd_choco": LocalSGD(2, Choco(0.2, TOP)),
    "local_sgd_choco_random": LocalSGD(2, Choco(0.1, COMPRESSORS["randk_private"])),
    "local_sgd_adagossip": LocalSGD(3, AdaGossip(0.01, TOP)),
    "local_sgd_deep_squeeze": LocalSGD(2, DeepSqueeze(0.05, TOP)),
    "diloco_dpsgd": DiLoCo(2, outer_momentum=0.5, inner=DPSGD()),
    "diloco_choco": DiLoCo(2, outer_momentum=0.5, nesterov=False, inner=Choco(0.2, TOP)),
    "streaming_diloco": StreamingDiLoCo(4, fragments=2, delay=3, outer_momentum=0.5),
    "streaming_diloco_waiting": StreamingDiLoCo(3, fragments=3, delay=0, local_weight=0.0, outer_momentum=0.0),
    "noloco": NoLoCo(2),
    "noloco_topk": NoLoCo(2, outer_lr=1.4, outer_momentum=0.0, compressor=TOP),
    "sparse_loco": SparseLoCo(TOP, period=2),
    "sparse_loco_statistical": SparseLoCo(COMPRESSORS["block_topk_statistical"], period=2),
    "fedadam_ssm": FedAdamSSM(TOP, period=2),
    "fedadam_ssm_every_step": FedAdamSSM(TopK(0.5), period=1),
    "dpsgd": DPSGD(),
    "dpsgd_overlapped": DPSGD(order="combine_then_adapt"),
    "dpsgd_float16": DPSGD(compressor=COMPRESSORS["float16"]),
    "choco": Choco(0.2, TOP),
    "choco_auto": Choco("auto", TOP),
    "adagossip_auto": AdaGossip("auto", TOP),
    "choco_auto_overlapped": Choco("auto", TOP, overlap=True),
    "choco_overlapped": Choco(0.2, TOP, overlap=True),
    "adagossip": AdaGossip(0.01, TOP),
    "adagossip_quasi_global": AdaGossip(0.01, TOP, quasi_global_momentum=0.9),
    "adagossip_overlapped": AdaGossip(0.01, TOP, quasi_global_momentum=0.9, overlap=True),
    "deep_squeeze": DeepSqueeze(0.05, TOP),
    "deep_squeeze_auto": DeepSqueeze("auto", TOP),
    "motef": MoTEF(0.2, TOP),
    "motef_auto": MoTEF("auto", TOP),
    "lead": LEAD(compressor=COMPRESSORS["natural"]),
    "lead_randk": LEAD(0.2, RandomK(ratio=0.5, shared=False, unbiased=True), copy_weight=0.25),
    "beer": MoTEF(0.1, COMPRESSORS["randk_private"], gradient_weight=1.0),
    "sgp": SGP(),
    "sgp_overlapped": SGP(overlap=True),
    "sgp_topk": SGP(0.2, TOP),
    "sgp_topk_overlapped": SGP(0.2, TOP, overlap=True),
    "def_atc": DEFATC(0.2, TOP),
    "def_atc_damped": DEFATC(0.3, COMPRESSORS["qsgd"], damping=0.8),
    "local_sgd_def_atc": LocalSGD(2, DEFATC(0.2, TOP)),
    "power_gossip": PowerGossip(),
    "power_gossip_rank_2": PowerGossip(rank=2, iterations=2, seed=3),
    "local_sgd_power_gossip": LocalSGD(2, PowerGossip(iterations=2)),
    "ef_sgd": EFSGD(TOP),
    "ef_sgd_momentum": EFSGD(TOP, momentum=0.9),
    "ef_sgd_block": EFSGD(COMPRESSORS["block"]),
    "ef_sgd_sign": EFSGD(COMPRESSORS["sign"]),
    "ef_sgd_loco": EFSGD(COMPRESSORS["uniform_grid"], error_average=0.8, error_reset_steps=5),
    "ef_sgd_loco_overlapped": EFSGD(TOP, momentum=0.5, overlap=True, error_average=0.5),
    "ef_sgd_gravac": EFSGD(TOP, smallest_ratio=0.05, ratio_period=2, gain_window=2, least_gain=0.6),
    "ef_sgd_gravac_overlapped": EFSGD(
        COMPRESSORS["block_per_tensor"],
        overlap=True,
        smallest_ratio=0.125,
        ratio_period=3,
        gain_window=3,
        least_gain=0.1,
    ),
    "gmc": GMC(TOP),
    "gmc_loco": GMC(TOP, detachment=0.3, error_average=0.5, error_reset_steps=7),
    "gmc_block": GMC(COMPRESSORS["block"]),
    "gmc_block_per_tensor": GMC(COMPRESSORS["block_per_tensor"], detachment=0.3),
    "gmc_gravac": GMC(COMPRESSORS["topk_int8"], smallest_ratio=0.1, ratio_period=4, gain_window=2, least_gain=0.5),
    "gmc_plus": GMC(TOP, detachment=0.3),
    "dgc": DGC(COMPRESSORS["topk_dense_1d"]),
    "dgc_warmup": DGC(TOP, nesterov=True, clip="rms", warmup_stages=2, warmup_steps=2),
    "demo": DeMo(chunk=4, k=2, momentum=0.9),
    "ef_sgd_overlapped": EFSGD(COMPRESSORS["threshold"], overlap=True),
    "gmc_overlapped": GMC(COMPRESSORS["block"], overlap=True, momentum=0.5),
    "gmc_plus_overlapped": GMC(TOP, overlap=True, momentum=0.5, detachment=0.3),
    "dgc_overlapped": DGC(TOP, overlap=True, warmup=(0.9, 0.5), warmup_steps=3),
    "efficient_adam": EfficientAdam(COMPRESSORS["log_grid_per_tensor"], downlink=COMPRESSORS["uniform_grid"]),
    "efficient_adam_decaying": EfficientAdam(TOP, downlink=TOP, rates="decaying", bias_correction=False),
    "efficient_adam_random": EfficientAdam(COMPRESSORS["qsgd"], downlink=COMPRESSORS["qsgd"]),
    "onebit_adam": OneBitAdam(COMPRESSORS["sign_per_tensor"], downlink=COMPRESSORS["sign_per_tensor"], freeze_step=4),
    "sketched_amsgrad": SketchedAMSGrad(columns=30, k=5, epsilon=0.1),
    "powersgd": PowerSGD(rank=1),
    "powersgd_momentum": PowerSGD(rank=2, momentum=0.9),
    **{f"choco_{name}": Choco(0.1, c) for name, c in COMPRESSORS.items() if not isinstance(c, ErrorFeedback)},
}

ALL_REDUCE = {"ssgd": SSGD(), "diloco": DiLoCo(2, outer_momentum=0.5)}
"""MPI chooses the order of their sums."""

SYNCHRONOUS = {kind for kind in ALGORITHMS.values() if issubclass(kind, Algorithm)}
assert {type(method) for method in [*DETERMINISTIC.values(), *ALL_REDUCE.values()]} | {SGD} == SYNCHRONOUS


def graph_for(method):
    """A graph on which `method` can train: a ring, or what its messages need."""
    return RandomMatching if isinstance(method, NoLoCo) else ring


ASYNCHRONOUS = {
    "asgd": ASGD(),
    "asgd_topk": ASGD(compressor=TopK(0.5)),
    "dc_asgd": DCASGD(lambda0=0.5),
    "dc_asgd_topk": DCASGD(compressor=TopK(0.5)),
    "dc_asgd_downlink": DCASGD(COMPRESSORS["uniform_grid"], COMPRESSORS["log_grid"], adaptive=False),
    "dc_gossip": DCGossip(0.5),
    "dc_gossip_topk": DCGossip(0.3, compressor=TopK(0.5)),
    "ad_psgd": ADPSGD(),
    "dc_gossip_plain": DCGossip(0.3, COMPRESSORS["float16"], lambda0=0.0, max_staleness=1),
}

assert {type(method) for method in ASYNCHRONOUS.values()} == {
    kind for kind in ALGORITHMS.values() if issubclass(kind, AsynchronousAlgorithm)
}
