"""Names of NV indexes and policies of counted licenses, against tpm2-tools, which are other hands' work."""

import hashlib
import os
import subprocess

import pytest

from hwlicense.core.tpm import nv, policy
from hwlicense.core.tpm.pcrs import Selection
from hwlicense.core.tpm.wire import number
from hwlicense_simulators import Tpm

COUNTER, OPENS = nv.FIRST, nv.FIRST + 1


@pytest.fixture
def tools(tmp_path):
    with Tpm() as tpm:

        def run(command, *more):
            command = [*command.split(), *more]
            done = subprocess.run(
                command, cwd=tmp_path, env=os.environ | tpm.environment, capture_output=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr.decode()
            return done.stdout.decode()

        run.folder = tmp_path  # type: ignore[attr-defined]
        yield run


def name_of(tools, handle):
    lines = tools(f"tpm2_nvreadpublic {handle:#x}").splitlines()
    return next(line.split()[-1] for line in lines if line.strip().startswith("name:"))


def counter(tools):
    tools(f"tpm2_nvdefine {COUNTER:#x} -C o -s 8 -p mine -a authread|authwrite|no_da|nt=counter")
    defined = name_of(tools, COUNTER)
    tools(f"tpm2_nvincrement {COUNTER:#x} -C {COUNTER:#x} -P mine")
    return defined, name_of(tools, COUNTER)


def test_the_name_of_a_counter(tools):
    public = nv.counter_public(COUNTER)
    assert counter(tools) == (public.unwritten.name.hex(), public.name.hex())


def test_the_name_of_an_index_that_counts_its_uses_and_the_policy_that_reads_it(tools):
    ways = []
    for code in ("TPM2_CC_NV_Read", "TPM2_CC_NV_Certify"):
        tools("tpm2_startauthsession -S session")
        tools(f"tpm2_policycommandcode -S session -L {code} {code}")
        tools("tpm2_flushcontext session")
        ways.append(policy.digest([policy.PolicyCommandCode({"TPM2_CC_NV_Read": 0x14E}.get(code, 0x184))]))
        assert (tools.folder / code).read_bytes() == ways[-1]
    tools("tpm2_startauthsession -S session")
    tools("tpm2_policyor -S session -L branches sha256:TPM2_CC_NV_Read,TPM2_CC_NV_Certify")
    tools("tpm2_flushcontext session")
    branches = policy.digest([policy.PolicyOR(tuple(ways))])
    assert (tools.folder / "branches").read_bytes() == branches
    tools(f"tpm2_nvdefine {OPENS:#x} -C o -s 8 -p mine -L branches -a authread|policyread|policywrite|no_da|nt=pinpass")
    assert name_of(tools, OPENS) == nv.pin_pass_public(OPENS, branches).unwritten.name.hex()


def test_the_steps_of_the_sealed_objects_policy(tools):
    counter(tools)
    tools(f"tpm2_nvread {COUNTER:#x} -C {COUNTER:#x} -P mine -o operand")
    tools("tpm2_pcrread sha256:7 -o pcr")
    value, values = (tools.folder / "operand").read_bytes(), hashlib.sha256((tools.folder / "pcr").read_bytes())
    public = nv.counter_public(COUNTER)
    tools("tpm2_startauthsession -S session")
    steps: list[policy.Step] = []
    for command, step in (
        ("tpm2_policypcr -l sha256:7", policy.PolicyPCR(Selection.parse("sha256:7"), values.digest())),
        (f"tpm2_policynv -C {COUNTER:#x} -P mine -i operand {COUNTER:#x} eq", policy.PolicyNV(public, value)),
        (
            "tpm2_policycountertimer --ult clock=36",
            policy.PolicyCounterTimer(policy.CLOCK, number(36, 8), policy.BELOW),
        ),
        ("tpm2_policycountertimer --eq safe", policy.PolicyCounterTimer(policy.SAFE, b"\1", policy.EQUAL)),
        ("tpm2_policycommandcode TPM2_CC_Unseal", policy.PolicyCommandCode(policy.UNSEAL)),
        ("tpm2_policyauthvalue", policy.PolicyAuthValue()),
        (f"tpm2_policysecret -c {COUNTER:#x} mine", policy.PolicySecret(public)),
    ):
        name, *rest = command.split()
        tools(f"{name} -S session -L policy", *rest)
        steps.append(step)
        assert (tools.folder / "policy").read_bytes() == policy.digest(steps), command
    tools("tpm2_flushcontext session")
