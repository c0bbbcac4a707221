"""Nothing that a test run leaves behind is met by another one, or by a user: caches go to a folder of their own."""

import atexit
import os
import shutil
import tempfile

if "MDPO_TEST_HF_HOME" not in os.environ:  # set by a parent test run that starts processes
    os.environ["MDPO_TEST_HF_HOME"] = tempfile.mkdtemp(prefix="mdpo-tests-")
    atexit.register(shutil.rmtree, os.environ["MDPO_TEST_HF_HOME"], ignore_errors=True)
os.environ["HF_HOME"] = os.environ["MDPO_TEST_HF_HOME"]
