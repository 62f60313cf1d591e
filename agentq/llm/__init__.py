"""The transport to model providers: wire formats, pooled HTTP, errors, price. A call gives one answer or one error."""
