"""Who may send, and when: limits are used fully without being met."""
