"""Calls that spend inferences before they begin, by a real account."""

from __future__ import annotations

import numpy
import onnxruntime
import pytest

from hwlicense.core.errors import ClosedError, ExceededError, Reason, UsageError
from hwlicense.device.model import Model
from hwlicense.device.reading import PackageFile
from hwlicense.integrations import metered
from hwlicense.integrations.onnxruntime import session
from tests.frameworks.conftest import picture
from tests.metered import Machine, limited, opened
from tests.packages import nothing_enclosed


def test_a_batch_is_spent_before_the_run_and_refused_whole(vendor, made, tmp_path):
    with opened(tmp_path, Machine(), limited(inferences=7)) as metering:
        pass
