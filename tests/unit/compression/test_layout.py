import pytest
import torch

from mpicomp.compression import ByRank, Field, Layout, PerTensor, Spec, TopK
from mpicomp.compression.message import index_dtype
from mpicomp.errors import DivergenceError

MIXED = Layout(
    (
        Field("bits", torch.uint8, 3),
        Field("index", torch.int16, 5, variable=True),
        Field("value", torch.float64, 5, variable=True),
        Field("scale", torch.float32, 1),
    )
)


def payload(count):
    return {
        "bits": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "index": torch.arange(count, dtype=torch.int16),
        "value": torch.linspace(0, 1, count, dtype=torch.float64) if count else torch.empty(0, dtype=torch.float64),
        "scale": torch.tensor([0.5]),
    }


@pytest.mark.parametrize("count", range(6))
def test_round_trip_with_every_count(count):
    wire = torch.zeros(MIXED.nbytes, dtype=torch.uint8)
    used = MIXED.pack(payload(count), wire)
    assert used == MIXED.nbytes_of(payload(count))
    for name, tensor in MIXED.unpack(wire[:used]).items():
        assert torch.equal(tensor, payload(count)[name]), name


def test_bytes_are_fields_counts_and_alignment():
    # 3, to 4; count 4, 2 x 2 = 12; count 4 = 16; 2 x 8 = 32; 4
    assert MIXED.nbytes_of(payload(2)) == 36
    assert MIXED.nbytes == 3 + 1 + 4 + 10 + 2 + 4 + 40 + 4
    assert Layout(()).nbytes == 0


def test_unpacked_fields_are_views():
    wire = torch.zeros(MIXED.nbytes, dtype=torch.uint8)
    MIXED.pack(payload(5), wire)
    MIXED.unpack(wire)["bits"].fill_(9)
    assert wire[:3].tolist() == [9, 9, 9]


def test_concatenation_names_the_parts():
    both = Layout.concatenate([Layout((Field("x", torch.uint8, 2),)), MIXED])
    assert [field.name for field in both.fields] == ["0.x", "1.bits", "1.index", "1.value", "1.scale"]


def test_index_width():
    assert index_dtype(2**16) == torch.int16
    assert index_dtype(2**16 + 1) == torch.int32
    with pytest.raises(ValueError, match="too long for 32-bit indices"):
        index_dtype(2**31 + 1)


def test_spec_splits_into_views():
    spec = Spec(("a", "b"), ((2, 3), ()), torch.float32)
    x = torch.arange(7.0)
    a, b = spec.split(x)
    assert a.tolist() == [0, 1, 2, 3, 4, 5] and b.tolist() == [6]
    assert [part.numel for part in spec.parts] == [6, 1]
    assert Spec.flat(5).numel == 5


def test_tensors_of_a_model_too_long_for_32_bits_have_indices_of_their_own():
    spec = Spec(("a", "b"), ((2**30,), (2**30 + 1,)))
    names = [field.name for field in PerTensor(TopK(0.001)).layout(spec).fields]
    assert names == ["0.values", "0.indices", "1.values", "1.indices"]


@pytest.mark.parametrize(("must_be", "refused"), [("", []), ("a number", ["nan"]), ("finite", ["nan", "inf"])])
def test_a_message_from_a_device_is_checked_on_the_host(must_be, refused):
    parts = (("weight", 2), ("bias", 1))
    layout = Layout((Field("signs", torch.uint8, 3), Field("scale", torch.float32, 3, True, must_be, parts)))
    wire = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for place, name in enumerate(["weight", "weight", "bias"]):
        for value in ("1", "nan", "inf"):
            scale = torch.ones(3)
            scale[place] = float(value)
            layout.pack({"signs": torch.zeros(3, dtype=torch.uint8), "scale": scale}, wire)
            if value in refused:
                with pytest.raises(DivergenceError, match=f"{name}: NaN"):
                    layout.finish(wire)
            else:
                layout.finish(wire)


def test_a_field_of_several_messages_knows_its_tensor():
    one = Layout((Field("scale", torch.float32, 1, must_be="finite"),))
    both = Layout.concatenate([one, one], ["weight", "bias"])
    wire = torch.zeros(both.nbytes, dtype=torch.uint8)
    both.pack({"0.scale": torch.ones(1), "1.scale": torch.full((1,), torch.nan)}, wire)
    with pytest.raises(DivergenceError, match="bias: NaN or infinity"):
        both.finish(wire)


def test_zeros_behind_a_code_are_cut_on_the_host():
    """In the middle, at the end, and of several messages; the bytes are then those of the CPU."""
    spec, x = Spec(("a", "b"), ((40, 20), (7,))), torch.randn(807, generator=torch.Generator().manual_seed(0))
    one = PerTensor(TopK(0.1), dense_1d=True)
    for layouts, names in (([one.layout(spec)], [""]), ([one.layout(spec), TopK(0.05).layout(spec)], ["0.", "1."])):
        layout = layouts[0] if len(layouts) == 1 else Layout.concatenate(layouts)
        payload = {
            prefix + name: tensor
            for prefix, compressor in zip(names, (one, TopK(0.05)), strict=False)
            for name, tensor in compressor.compress(x, spec, None).items()
        }
        expected, wire = (torch.zeros(layout.nbytes, dtype=torch.uint8) for _ in range(2))
        nbytes = layout.pack(payload, expected)
        longest = {field.name: field.numel for field in layout.fields}
        padded = {name: torch.cat([t, t.new_zeros(longest[name] - len(t))]) for name, t in payload.items()}
        longer = layout.pack(padded, wire)
        assert longer > nbytes == layout.finish(wire[:longer])
        assert torch.equal(wire[:nbytes], expected[:nbytes])
        layout.check_codes(layout.unpack(wire[:nbytes]))
        code = next(name for name in reversed(payload) if name.endswith("indices"))
        payload[code] = payload[code].clone()
        payload[code][-1] ^= 255
        with pytest.raises(IndexError, match="damaged"):
            layout.check_codes(payload)


@pytest.mark.parametrize("values", ["full", "float16", "int8"])
def test_a_nan_that_a_device_selected_is_found_on_the_host(values):
    spec = Spec(("a", "b", "c"), ((10, 10), (10, 10), (9,)))
    compressor = PerTensor(TopK(0.1, values), dense_1d=True)
    layout, x = compressor.layout(spec), torch.ones(209)
    wire = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for field, name in (("scale" if values == "int8" else "values", "b"), ("dense", "c")):
        payload = {name: t.clone() for name, t in compressor.compress(x, spec, None).items()}
        payload[field][1 if field == "scale" else -1] = torch.nan
        nbytes = layout.pack(payload, wire)
        with pytest.raises(DivergenceError, match=f"{name}: NaN"):
            layout.finish(wire[:nbytes])


def test_messages_of_several_compressors_are_checked_on_the_host():
    compressor, spec = ByRank((TopK(0.1), TopK(0.001))), Spec.flat(1000)
    layout = compressor.layout(spec)
    fields = {field.name: field for field in layout.fields}
    assert fields["values"].must_be == "a number"
    assert fields["indices.uint8"].code_of == 1000 and fields["indices.int16"].code_of == 0
    for rank, code in ((0, "indices.uint8"), (1, "indices.int16")):
        state = compressor.init(spec, torch.device("cpu"), rank)
        payload = compressor.compress(torch.arange(1000.0), spec, state)
        assert payload[code].numel()
        layout.check_codes(payload)
        wire = torch.zeros(layout.nbytes, dtype=torch.uint8)
        nbytes = layout.pack({**payload, "values": payload["values"] * torch.nan}, wire)
        with pytest.raises(DivergenceError, match="NaN"):
            layout.finish(wire[:nbytes])


def test_a_number_of_the_host_stays_there():
    layout = Layout((Field("seed", torch.int64, 1, on_host=True), Field("ratio", torch.float64, 1, on_host=True)))
    wire = torch.zeros(layout.nbytes, dtype=torch.uint8)
    payload = {"seed": torch.tensor([2**63 - 1]), "ratio": torch.tensor([1 / 3], dtype=torch.float64)}
    layout.pack(payload, wire)
    found = layout.unpack(wire)
    assert all(torch.equal(found[name], tensor) for name, tensor in payload.items())
