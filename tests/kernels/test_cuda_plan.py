"""Launch shapes and the compiled-kernel cache: what can be checked without a GPU."""

import contextlib
import json
import warnings

import pytest
import torch

from whit.formats.binary_residual import BinaryResidual
from whit.formats.dense import Dense
from whit.formats.grouped_integer import GroupedInteger
from whit.formats.level_table import LevelTable
from whit.formats.structured_binary import StructuredBinary
from whit.formats.vector_codebook import VectorCodebook
from whit.kernels import cuda_linear, cuda_ops, nvrtc
from whit.kernels.cuda_bulk import bulk_stage_bytes
from whit.kernels.cuda_layout import WIDEST, layout_of
from whit.kernels.cuda_plan import choose, place_gemv, plan, room
from whit.kernels.cuda_shapes import Shape, gemv_shapes
from whit.kernels.cuda_tuned import keep_tuned, tuned_shapes, tuning_file, tuning_key
from whit.kernels.cuda_wide import Decode, WideShape, bucket, holds_groups, shared_bytes, wide_supports
from whit.kernels.cuda_wide_plan import MANY, decodes_first, wide_plan, wide_shapes

H200 = (132, 232448)
pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_found_shape_is_kept_and_used():
    layout = layout_of(LevelTable(2, 128), 4096)
    key, shape = tuning_key(layout, 512, 4096, 1), Shape(256, 256, 1, True)
    assert choose("No Such GPU", layout, 512, 4096, 1, *H200).shape != shape
    keep_tuned("No Such GPU", {key: shape})
    assert choose("No Such GPU", layout, 512, 4096, 1, *H200).shape == shape
    assert choose("No Such GPU", layout, 512, 4096, 16, *H200).shape != shape
    assert set(json.loads(tuning_file("No Such GPU").read_text())) == {key}


def test_a_found_shape_that_does_not_fit_is_passed_over():
    layout = layout_of(LevelTable(2, 128), 4096)
    keep_tuned("No Such GPU", {tuning_key(layout, 512, 4096, 1): Shape(768, 512, 1, True)})
    launch = choose("No Such GPU", layout, 512, 4096, 1, 40, 65_536)
    assert launch.shared <= 65_536
    assert launch.shape.threads < 768


@pytest.mark.parametrize("content", ["", "[]", "{broken", '{"a": {"threads": 1, "no_such_field": 2}}'])
def test_a_damaged_file_of_shapes_is_ignored(content):
    path = tuning_file("No Such GPU")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert tuned_shapes("No Such GPU") == {}


def test_what_multiplies_depends_on_vectors_device_and_what_was_found(hopper, monkeypatch):
    layout = layout_of(LevelTable(2, 128), 4096)
    assert cuda_ops.choice(layout, 512, 4096, 1, 0).shape in gemv_shapes(layout, clusters=True)
    assert isinstance(cuda_ops.choice(layout, 512, 4096, 256, 0), WideShape)
    assert isinstance(cuda_ops.choice(layout, 512, 4096, 2048, 0), WideShape)
    assert isinstance(cuda_ops.choice(layout_of(GroupedInteger(4, 128, True), 4096), 512, 4096, 2048, 0), WideShape)
    assert isinstance(cuda_ops.choice(layout_of(BinaryResidual(128, True), 4096), 512, 4096, 2048, 0), WideShape)
    dear = layout_of(GroupedInteger(8, 128, True), 4096)
    assert isinstance(cuda_ops.choice(dear, 512, 4096, 256, 0), WideShape)
    assert cuda_ops.choice(dear, 512, 4096, 2048, 0) == Decode()
    assert cuda_ops.choice(layout_of(LevelTable(2, 128), 4000), 512, 4000, 256, 0) == Decode()
    assert cuda_ops.choice(layout_of(LevelTable(2, 32), 4096), 512, 4096, 256, 0) == Decode()
    found = wide_shapes(layout, 16, 4096, H200[1])[1]
    keep_tuned("No Such GPU", {tuning_key(layout, 512, 4096, tokens): found for tokens in (16, 1)})
    keep_tuned("No Such GPU", {tuning_key(layout, 512, 4096, 1024): Decode()})
    keep_tuned("No Such GPU", {tuning_key(layout, 512, 4096, 512): WideShape(9, 9, 9, 9, 9)})
    cuda_ops.choice.cache_clear()
    assert cuda_ops.choice(layout, 512, 4096, 16, 0) == found
    assert cuda_ops.choice(layout, 512, 4096, 1, 0).shape in gemv_shapes(layout, clusters=True)
    assert cuda_ops.choice(layout, 512, 4096, 1024, 0) == Decode()
    assert cuda_ops.choice(layout, 512, 4096, 512, 0) in wide_shapes(layout, 512, 4096, H200[1])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (10, 0))
    cuda_ops.choice.cache_clear()
    assert cuda_ops.choice(layout, 512, 4096, 16, 0).shape.threads in (128, 256, 512)
    assert cuda_ops.choice(layout, 512, 4096, 256, 0) == Decode()


def test_blocks_that_share_staging_come_in_whole_clusters_and_stage_once():
    layout = layout_of(LevelTable(1, 128), 4096)
    shared = [shape for shape in gemv_shapes(layout, True, True) if shape.share > 1]
    assert {shape.share for shape in shared} == {2, 4} and gemv_shapes(layout) == [
        shape for shape in gemv_shapes(layout, True, True) if shape.share == 1 and not shape.eager and shape.depth == 3
    ]
    for shape in shared:
        launch = plan(layout, 11008, 4096, 1, 131, H200[1], [shape])
        assert launch.grid % shape.share == 0 and launch.chunk >= 4096
        with pytest.raises(ValueError, match="no launch"):
            plan(layout, 11008, 65536, 1, 131, 60_000, [shape])
        with pytest.raises(ValueError, match="no launch"):
            plan(layout, 16, 4096, 1, 131, H200[1], [shape])


def test_without_a_measurement_small_products_leave_room_for_the_next_kernel():
    layout = layout_of(LevelTable(2, 128), 4096)
    beside = choose("No Such GPU", layout, 4096, 4096, 1, *H200).shape
    assert beside.eager and beside.resident == 2 and not beside.bulk
    wide = layout_of(BinaryResidual(128, True), 8192)  # half a multiprocessor would hold half of x
    assert choose("No Such GPU", wide, 28672, 8192, 1, *H200).shape.resident == 1
    early = {"clusters": False}  # of a device that cannot start a kernel before the last ends
    small, large = (choose("No Such GPU", layout, rows, 4096, 1, *H200, **early) for rows in (4096, 28672))
    assert small.shape.resident == 2 and 2 * (small.shared + 1024) <= H200[1] + 1024
    assert large.shape == Shape(512, 1024, 1, True) and not large.shape.eager
    down = choose("No Such GPU", layout_of(LevelTable(2, 128), 11008), 4096, 11008, 1, *H200, **early)
    assert down.shape.item == 512  # 10 items of 1024 and three quarters of one would leave warps idle


@pytest.mark.parametrize(
    ("layout", "columns", "rows", "item", "comes"),
    [
        (LevelTable(2, 128), 4096, 4096, 1024, True),
        (LevelTable(1, 128), 4096, 100, 512, True),
        (LevelTable(1, 128), 11008, 4096, 1024, False),  # the levels of a row are no multiple of 16 bytes
        (BinaryResidual(128, True), 4096, 4096, 1024, True),
        (BinaryResidual(128, True), 4096, 4096, 512, False),  # nor those of an item
        (BinaryResidual(0, False), 4096, 4096, 512, True),
        (BinaryResidual(0, False), 4096, 4100, 512, False),  # nor those of the last rows
        (BinaryResidual(0, True), 4096, 4096, 512, False),
        (LevelTable(2, 0), 1000, 4096, 512, False),  # rows of 250 bytes
        (LevelTable(2, 2048), 4096, 4096, 1024, False),
        (GroupedInteger(2, 128, False), 4096, 4096, 1024, False),
        (GroupedInteger(3, 128, True), 4096, 4096, 512, False),
    ],
)
def test_the_copy_engine_brings_what_lies_at_multiples_of_sixteen_bytes(layout, columns, rows, item, comes):
    described = layout_of(layout, columns)
    stage = bulk_stage_bytes(described, rows, item)
    launch = place_gemv(described, rows, columns, *H200, Shape(256, item, 2, True, bulk=True))
    assert (stage is not None) is comes and (launch is not None) is comes
    if comes:
        assert stage % 8 == 0 and stage >= described.stage_bytes(item)


@pytest.mark.parametrize(
    ("columns", "threads", "turns"),
    [(8192, 512, (1, 1)), (4096, 256, (1, 1)), (8192, 256, (2, 2)), (11008, 256, (2, 4)), (28672, 256, (2, 4))],
)
def test_a_warp_asks_at_once_for_all_of_x_that_fits_its_registers(columns, threads, turns):
    launch = place_gemv(layout_of(LevelTable(1, 0), columns), 4096, columns, *H200, Shape(threads, 512, 1, True))
    assert launch.turns() == turns and launch.chunk >= columns
    blocks = launch.chunk // 128
    assert turns[1] == 4 or turns[1] * 4 * (threads // 32) >= blocks


def test_rings_have_no_more_stages_than_the_shape_allows():
    layout = layout_of(LevelTable(1, 128), 4096)
    depths = [plan(layout, 4096, 4096, 1, *H200, [Shape(512, 512, 1, True, depth=depth)]).depth for depth in (2, 3, 4)]
    assert depths == [2, 3, 4]
    assert plan(layout, 4096, 4096, 1, H200[0], 60_000, [Shape(512, 512, 1, True, depth=4)]).depth == 2


def test_shapes_of_an_older_file_are_read():
    path = tuning_file("No Such GPU")
    path.parent.mkdir(parents=True)
    path.write_text(
        '{"a key": {"threads": 512, "item": 1024, "unroll": 8, "bitwise": true, "resident": 1, "share": 2}}'
    )
    tuned_shapes.cache_clear()
    assert tuned_shapes("No Such GPU") == {"a key": Shape(512, 1024, 8, True, 1, 2, False, 3)}


def test_formats_that_one_vector_kernels_do_not_read():
    codebook, narrow = layout_of(VectorCodebook(256, 12, False), 4096), layout_of(VectorCodebook(256, 5, False), 4096)
    assert cuda_ops.size_class(codebook, 1) == bucket(1) == 8
    assert wide_supports(codebook, 4096) and not wide_supports(codebook, 4090) and not wide_supports(narrow, 4096)
    assert not wide_supports(layout_of(StructuredBinary(4, 8, 0), 4096), 4096)
    assert layout_of(StructuredBinary(16, 32, 0), 4096) is None
    for layout in (codebook, layout_of(StructuredBinary(4, 8, 128), 4096), layout_of(GroupedInteger(4, 64, False), 64)):
        fields = cuda_ops.layout_fields(layout)
        again = cuda_ops.layout_from(fields)
        assert again.defines() == layout.defines()
        assert [bool(name) for name in again.names] == [bool(name) for name in layout.names]


@pytest.mark.parametrize("layout", [LevelTable(2, 128), GroupedInteger(8, 64, True), VectorCodebook(256, 16, False)])
def test_every_shape_fits_and_covers_the_product(layout):
    for columns in (64, 4096, 11008):
        described = layout_of(layout, columns)
        for tokens in (2, 16, 40, 200, 5000):
            chosen = wide_plan(described, 1000, columns, tokens, *H200)
            assert chosen in wide_shapes(described, tokens, columns, H200[1])
            for shape in wide_shapes(described, tokens, columns, H200[1]):
                assert shape.resident * (shared_bytes(described, shape) + 1024) <= H200[1] + 1024
                assert columns % shape.held == 0 and holds_groups(described, shape)
                assert shape.splits <= 8 and shape.ahead < shape.held // 16
                assert shape.grid(1000, tokens) * 64 * shape.row_groups * shape.tokens >= 1000 * tokens * shape.splits
    with pytest.raises(ValueError, match="no launch of 16 x 512 fits 1024 bytes"):
        wide_plan(layout_of(layout, 512), 16, 512, 16, 1, 1024)


def test_tiles_that_do_not_fill_the_device_are_cut_finer():
    shape = WideShape(256, 2, 1, 3, 1, 128, 1, rest=4)
    whole = WideShape(256, 2, 1, 3, 1, 128, 1)
    assert shape.tiles(11008, 2048) == 688
    assert shape.parts(11008, 2048, 132) == [(whole, 0, 660), (WideShape(256, 2, 4, 3, 1, 128, 1), 660, 28)]
    assert shape.parts(11008, 256, 132) == [(whole, 0, 86)]  # nothing fills it
    assert shape.parts(128 * 132, 256, 132) == [(whole, 0, 132)]  # nothing is left over
    assert whole.parts(11008, 2048, 132) == [(whole, 0, 688)]
    layout = layout_of(LevelTable(2, 128), 4096)
    assert wide_plan(layout, 11008, 4096, 2048, *H200).rest == 4
    for other in (layout, layout_of(BinaryResidual(128, True), 4096)):
        assert wide_plan(other, 11008, 4096, 256, *H200) == WideShape(128, 3, 1, 2, 1, 256, 3, staged=True)
        assert wide_plan(other, 4096, 4096, 256, *H200) == WideShape(128, 2, 2, 2, 1, 256, 3, staged=True)


def test_two_resident_blocks_share_the_memory():
    assert room(232_448, Shape(512, 512, 2)) == 232_448
    assert 2 * (room(232_448, Shape(512, 512, 2, resident=2)) + 1024) <= 232_448 + 1024


def test_nothing_fits_in_nothing():
    with pytest.raises(ValueError, match="no launch of 16 x 512 fits 1024 bytes"):
        plan(layout_of(LevelTable(2, 128), 512), 16, 512, 1, 1, 1024)


def test_layouts_say_what_is_multiplied_and_what_only_decoded():
    assert layout_of(LevelTable(2, 64), 512).multiplies
    assert layout_of(LevelTable(2, 0), 500).multiplies
    assert not layout_of(LevelTable(2, 32), 512).multiplies
    assert not layout_of(LevelTable(3, 128), 512).multiplies
    assert not layout_of(GroupedInteger(2, 128, True), WIDEST + 8).multiplies
    assert layout_of(LevelTable(2, 20), 512) is None
    assert layout_of(Dense("float16"), 512) is None


def test_kernels_are_compiled_once(monkeypatch):
    made = []

    def compile_cubin(source, options):
        made.append(source)
        return b"code of " + source.encode()

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    assert nvrtc.cached_cubin("one", ["-a"]) == b"code of one"
    assert nvrtc.cached_cubin("one", ["-a"]) == b"code of one"
    assert nvrtc.cached_cubin("two", ["-a"]) == b"code of two"
    assert nvrtc.cached_cubin("one", ["-b"]) == b"code of one"
    assert made == ["one", "two", "one"]


def test_a_cache_that_cannot_be_written_costs_only_time(monkeypatch, tmp_path):
    (tmp_path / "whit").write_text("a file where the folder would be")
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, options: b"code")
    assert nvrtc.cached_cubin("one", []) == b"code"


def test_a_damaged_file_of_code_is_compiled_again(monkeypatch):
    made = []
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, options: made.append(source) or b"code of " * 9)
    code = nvrtc.cached_cubin("one", [])
    (path,) = nvrtc.cache_folder().iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole + b"x", whole[:40] + b"?" + whole[41:]):
        path.write_bytes(damaged)
        made.clear()
        assert nvrtc.cached_cubin("one", []) == code
        assert made == ["one"]
        assert path.read_bytes() == whole
    assert [item.name for item in nvrtc.cache_folder().iterdir()] == [path.name]


def test_a_user_without_a_home_compiles_each_time(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(nvrtc.Path, "home", no_home)
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda source, options: b"code")
    assert nvrtc.cached_cubin("one", []) == b"code"


@pytest.mark.parametrize("layout", [GroupedInteger(2, 64, False), GroupedInteger(4, 64, False), LevelTable(2, 64)])
def test_groups_of_64_are_offered_as_bit_planes(layout):
    described = layout_of(layout, 4096)
    shapes = gemv_shapes(described, clusters=True)
    launches = [place_gemv(described, 4096, 4096, *H200, shape) for shape in shapes if shape.bitwise]
    assert sum(launch is not None and launch.chunk == 4096 for launch in launches) >= 2
    assert len(set(shapes)) == len(shapes) and not gemv_shapes(described, binary=False)[0].bitwise
    assert not layout_of(BinaryResidual(64, True), 4096).bitwise


def test_devices_without_binary_tensor_cores_get_limbs():
    layout = layout_of(LevelTable(2, 128), 4096)
    keep_tuned("No Such GPU", {tuning_key(layout, 512, 4096, 1): Shape(256, 256, 1, True)})
    for binary, expected in ((True, True), (False, False)):
        assert choose("No Such GPU", layout, 512, 4096, 1, *H200, binary=binary).shape.bitwise is expected
        assert plan(layout, 768, 4096, 1, *H200, gemv_shapes(layout, binary)).shape.bitwise is expected


def test_a_device_that_kernels_cannot_be_compiled_for_runs_plain_with_one_warning(monkeypatch):
    def no_compiler(*arguments):
        raise nvrtc.CompilationError("no NVRTC library was found")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(cuda_linear, "kernel", no_compiler)
    cuda_linear._compiles.cache_clear()
    with pytest.warns(UserWarning, match="plain version on CUDA device 3: no NVRTC library"):
        assert not cuda_linear.works(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cuda_linear.works(3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert not cuda_linear.works(4)
    cuda_linear._compiles.cache_clear()


def test_a_machine_without_nvrtc_is_told_what_to_install(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(nvrtc.ctypes, "CDLL", missing)
    with pytest.raises(nvrtc.CompilationError, match=r"no NVRTC library .*\(install a CUDA build of torch"):
        nvrtc.compiler_library()


def test_what_is_dear_to_expand_is_decoded_first_for_many_vectors() -> None:
    """Bytes, and integers of more than two bits in groups of 64; not for few vectors."""
    layouts = {
        (bits, group): layout_of(GroupedInteger(bits, group, False), 4096)
        for bits in (2, 3, 4, 8)
        for group in (64, 128)
    }
    found = {key for key, layout in layouts.items() if layout is not None and decodes_first(layout, MANY)}
    assert found == {(3, 64), (4, 64), (8, 64), (8, 128)}
    assert not any(layout is not None and decodes_first(layout, MANY // 2) for layout in layouts.values())
