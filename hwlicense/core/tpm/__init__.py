"""TPM 2.0 without a TPM: structures, names, policies, duplication, credentials and quotes, on bytes alone.

"Part 1" and "Part 2" are those of the TCG's TPM 2.0 Library Specification.
"""
