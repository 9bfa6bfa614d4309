"""Tables, plots and reports of measurements."""
