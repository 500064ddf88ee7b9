"""Our layers in the forms that the runners of other benchmark suites take; see README.md."""
