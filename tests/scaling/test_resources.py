"""What a run used: bytes of collectives, energy, cost, and nothing made up for what is not known."""

import pytest

from recscale.scaling import resources

# Two all-reduces as compilers write them: operands with their shapes, and by name alone; one begins and is done later.
HLO = """
HloModule jit_step, num_partitions=8
  %dot.1 = f32[16,32]{1,0} dot(f32[16,8]{1,0} %a, f32[8,32]{1,0} %b)
  %small = bf16[10]{0} convert(%c)
  ROOT %all-reduce.2 = f32[16,32]{1,0} all-reduce(f32[16,32]{1,0} %dot.1), replica_groups={{0,1}}, to_apply=%add
  %all-reduce-start.1 = bf16[10]{0} all-reduce-start(%small), channel_id=3, to_apply=%add
  %all-reduce-done.1 = bf16[10]{0} all-reduce-done(%all-reduce-start.1)
  %ag = f32[64,32]{1,0} all-gather(%dot.1), dimensions={0}
  %many = (f32[4]{0}, f32[8]{0}) all-reduce(%four, /*index=1*/%eight), to_apply=%add
  %four = f32[4]{0} copy(%d)
  %eight = f32[8]{0} copy(%e)
"""


def test_collectives_of_a_program_are_counted_by_their_operands():
    assert resources.collective_bytes(HLO) == {"all-reduce": 2048 + 20 + 16 + 32, "all-gather": 16 * 32 * 4}
    assert resources.collective_bytes("%a = f32[4] add(%b, %c)") == {}
    found = resources.network(resources.collective_bytes(HLO), 100)
    assert found["communication_bytes"] == {"value": 100 * (2 * 2048 + 68), "unit": "B", "source": "counted"}
    assert resources.network(None, 100)["communication_bytes"]["source"] == "absent"


def test_a_constant_power_gives_power_times_time():
    now = iter([0.0, 10.0, 40.0, 3600.0])
    meter = resources.Meter(lambda: 100.0, clock=lambda: next(now))
    for _ in range(4):
        meter.sample()
    assert meter.kwh == pytest.approx(0.1)
    meter.resume_from(0.3)
    assert meter.kwh == pytest.approx(0.4)
    silent = resources.Meter(None)
    with silent.running():
        pass
    assert silent.kwh is None


def test_what_nobody_said_is_absent_and_never_zero():
    bare = resources.energy_and_money(2.0, 10_000, {})
    assert {entry["source"] for entry in bare.values()} == {"absent"} and all(e["value"] is None for e in bare.values())
    stated = {"watts_per_device": 250.0, "usd_per_device_hour": 3.0, "grid_kg_per_kwh": 0.2}
    told = resources.energy_and_money(2.0, 3_000_000, stated)
    assert told["energy_kwh"] == {"value": 0.5, "unit": "kWh", "source": "estimated"}
    assert (told["co2e_kg"]["value"], told["cost_usd"]["value"]) == (0.1, 6.0)
    assert told["usd_per_million_rows"]["value"] == 2.0
    measured = resources.energy_and_money(2.0, 1, stated, measured_kwh=0.4)
    assert measured["energy_kwh"] == {"value": 0.4, "unit": "kWh", "source": "measured"}


def test_computation_is_counted_and_speeds_are_of_the_clock():
    flops = {"forward_flops_per_row": 10.0, "train_flops_per_row": 30.0, "train_flops": 3e4}
    clock = {"wall_seconds": 7200.0, "devices": 4, "rows_per_second": 100.0} | resources.percentiles([0.1, 0.2, 0.3])
    found = resources.computation(flops, clock, peak=6000.0)
    assert found["device_hours"]["value"] == 8.0 and found["mfu"]["value"] == 0.5
    assert found["step_ms_p50"] == {"value": pytest.approx(200.0), "unit": "ms", "source": "measured"}
    assert resources.computation(flops, clock, peak=None)["mfu"]["source"] == "absent"
    assert found["input_wait_share"]["source"] == "absent" and resources.percentiles([]) == {}
