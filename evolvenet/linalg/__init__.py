"""Pure tensor mathematics: spectra, ranks, least squares. May import nothing but `errors`."""
