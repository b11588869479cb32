"""The engines we are measured against, each behind the same small protocol."""
