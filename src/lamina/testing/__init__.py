"""Public proof: conformance suites, the model disk and the crash disk, for any driver."""
