"""Domain XML, lxml only: what the XML of a guest says, and how it is made to fit another host. Text in, text out.

document.py      parse_xml, DomainDocument: one value changed, every other byte kept
  spans.py       where each element stands in the text
facts.py         XML -> GuestFacts, for the plan
rules.py         files of rules, checked against xml/virtmig-rules.rng -> Rules, chosen by hosts and guest
  transforms.py  what a rule does
  places.py      THE TABLE of values that belong to the host
  cpu_sets.py    0-3,^2,8
guest_abi.py     compare, refuse: what the guest would see change
  guest_view.py  what the guest sees of an XML; its table says what it does not see
rewriting.py     rewrite(xml, rules, source, destination) -> the new XML and the list of changes
"""
