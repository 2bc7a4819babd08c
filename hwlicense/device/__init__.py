"""The machine that runs the model. Never imports the vendor's side."""
