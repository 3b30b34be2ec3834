"""Small real models and text, bundled or from the package index, for the demo and the tests."""
