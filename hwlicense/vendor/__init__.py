"""The issuing side. Needs no TPM and no TPM library; never imports the device's side."""
