"""With which words does a reply affirm, deny, offer together, suppose or take back a choice?

Every pattern is linear: no unbounded repetition stands beside another that matches the same letters.
"""

from __future__ import annotations

import re

MARKUP = re.compile(
    r"\\(?:boxed|fbox|text(?:bf|rm|it)?|math(?:bf|rm|it|sf)|left|right)\b|</?(?:answer|b|strong|em|i|p|span|final_answer)>|[*`$_{}\\#]"
)
FINAL_MARK = re.compile(r"\\boxed\b|<(?:final_)?answer>")
IDIOMS = re.compile(
    r"\b(?:no doubt|without (?:a |any )?(?:doubt|question)|undoubtedly|none other than|no question|not only)\b",
    re.IGNORECASE,
)
ALL_BUT = re.compile(r"\b(?:anything|everything|all|any) but\b", re.IGNORECASE)
REVISES = re.compile(
    r"(?<![\w'’])(?:(?:oh |oops,? )?no,? wait|wait,? no|wait|hold on|hang on|hmm,? no|oops|sorry|correction|scratch that|"
    r"strike that|i mean(?:t)?|on second thoughts?|on reflection|thinking again|let me (?:re\w+|correct)[^.,:;]{0,40}|"
    r"i (?:have )?changed? my mind(?: to)?|change (?:that|it|my answer) to|actually|make that|or rather|"
    r"but now|now i (?:think|believe|see)|then i (?:saw|see|reali[sz]ed?|notice[sd]?))(?![\w'’])"
    r"|(?:\A|(?<=[.,?!…;\n—–-])|(?<=[.,?!…;\n—–-]\s))no(?=\s*[,.:;!—–-])",
    re.IGNORECASE,
)
RETRACTS = re.compile(
    r"no\W*\Z|scratch that|strike that|(?:\w+\W+){1,3}?(?:that|it|this)\s*(?:is|was|['’]s)(?:n['’]t|\s+not|\s+wrong|\s+incorrect|"
    r"\s+(?:a|my) mistake)\b",
    re.IGNORECASE,
)
BREAKS = re.compile(
    r"[,;:!?\n]|\.(?!\d)|[—–]|(?<=\s)-(?=\s)|(?<![\w'’])(?:but|however|so|therefore|thus|hence|because|since|as|"
    r"then|though|although|while|whereas|which|leaving|and|yet|instead,?)(?![\w'’])(?! of\b)",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[!?\n;]|\.(?!\d)")
CONTRAST = re.compile(r"[!?\n;]|\.(?!\d)|(?<!\w)(?:but|however|yet|then|now)(?!\w)", re.IGNORECASE)
JOIN = r"\s*(?:,?\s*(?:and/or|or|and|nor|&|\+|/|\||,|vs\.?|versus)\s*)(?:(?:also|maybe|perhaps|possibly|option|choice)\s+)?"
JOINED = re.compile(JOIN + r"\Z", re.IGNORECASE)
VERBS = (
    r"(?:is|was|are|were|be|looks?|looked|seems?|seemed|appears?|sounds?|remains?|(?:would|must|should|has to|will) be)"
)
ADVERBS = r"(?:\s+(?:\w+ly|also|just|too|both|all|therefore|thus|indeed|in fact|quite|so|far|probably|to be))*"
DENIES_BEFORE = re.compile(
    r"(?<![\w'’])(?:not|never|neither|nor|no|cannot|\w+n['’]t|rul(?:e|ed|es|ing) out|eliminat\w+|exclud\w+|discard\w*|"
    r"except|but not|instead of|rather than|other than|than|unlike|without|doubt\w*|reject\w*|dismiss\w*|den(?:y|ied)|"
    r"avoid|incorrect(?:ly)?|wrong(?:ly)?|false|unlikely|impossible|against|nicht|pas)(?![\w'’])|不是|不选|不選|不为|不為|不会是|並非|并非|아닌",
    re.IGNORECASE,
)
DENIED_LABEL = re.compile(
    r"(?<!\w)(?:wrong|incorrect|false|eliminated|excluded|ruled out|not|rejected)"
    r"(?:\s+(?:answers?|options?|choices?|one))?\s*(?:is|are|:|：)*\s*\Z",
    re.IGNORECASE,
)
DENIES_AFTER = re.compile(
    rf"\s*,?\s*(?:which\s+|that\s+)?(?:(?:{VERBS}|can(?:\s+\w+ly)?\s+be|could\s+be|has\s+been|have\s+been|gets?){ADVERBS}\s+"
    r"(?:the\s+|an?\s+)?(?:not|never|wrong|incorrect|false|out|ruled|eliminated|excluded|discarded|rejected|dismissed|"
    r"unlikely|impossible|invalid|implausible|inaccurate|inconsistent|too|nowhere)\b"
    r"|(?:is|was|are|were|do|does|did|can|could|would|wo|must|should)n['’]?t\b|can['’]t\b|won['’]t\b|cannot\b|never\b"
    r"|(?:can|could|would|do|does|did|will|must|should)\s+not\b|fails?\b|contradicts?\b)"
    r"|\s*(?:是?不(?:对|對|正确|正確|是)|是?错|是?錯|は違|ではな|가 아니|이 아니)",
    re.IGNORECASE,
)
RIGHT = (
    r"(?:correct|right|true|best|accurate|appropriate|valid|most\s+\w+|answer|one|it|solution|closest|choice|winner)"
)
AFFIRMS_AFTER = re.compile(
    rf"\s*(?:{VERBS}{ADVERBS}\s+(?:the\s+|my\s+|our\s+)?(?:only\s+|final\s+|single\s+|most\s+)?{RIGHT}\b"
    r"|it\s+is\b|(?:fits|matches|works|holds)\b(?!\s+(?:neither|no)\b))",
    re.IGNORECASE,
)
MAYBE_AFTER = re.compile(r"\s*(?:may|might|could|can)\b|\s*(?:looked|seemed|was|were)\b", re.IGNORECASE)
MAYBE_BEFORE = re.compile(
    r"(?<!\w)(?:perhaps|maybe|possibly|if|whether|suppose|supposing|assume|assuming|unless|say|why|unsure|wonder\w*|"
    r"between|not sure)(?!\w)",
    re.IGNORECASE,
)
EARLIER = re.compile(
    r"(?<!\w)(?:at first|initially|originally|at first glance|first (?:thought|guess\w*|chose|picked|impression)|"
    r"(?:was|were) tempted|used to|previously|i thought|tempting|people (?:say|think)|one might|would have been|"
    r"had been)(?!\w)",
    re.IGNORECASE,
)
COPULA = (
    r"(?:(?:is|are|was|would be|should be|must be|might be|may be|could be|will be|has to be|seems to be|appears to be|"
    r"['’]s|=|→|⇒|->|=>|:|：|是|为|為|은|는)\s*)+"
)
SURELY = (
    r"(?:(?:most likely|likely|probably|definitely|clearly|certainly|surely|obviously|simply|just|therefore|thus|hence|"
    r"indeed|still|now|actually|either|option|choice|letter|answer|the|number|most probably|in fact)[\s:]+)*"
)
FINAL_CUE = re.compile(
    rf"(?:final|last)\s+(?:answer|choice|decision|pick|option)\b[^.\n!?;]{{0,30}}?\s*{COPULA}{SURELY}\W*\Z|(?:final|last)\s+answer\s+\W*\Z",
    re.IGNORECASE,
)
CUE = re.compile(
    rf"(?:(?<!\w)(?:answer|option|choice|solution|conclusion|response|pick|guess|result|select|选|選|정답|답|答案|答え)s?"
    rf"(?:\s+(?:here|to (?:the|this) question|that \w+ \w+|for (?:the|this) question|then))?\s*[\"'”]?\s*{COPULA}{SURELY}"
    r"|(?<!\w)(?:answer|正解は|答えは|答案选|答案選|选择|選擇|选|選|옵션)\s*"
    rf"|(?<!\w)(?:choose|chose|pick|select|selecting|choosing|go(?:ing)? (?:with|for)|"
    rf"opt(?:ing)? for|lean(?:ing)? (?:towards?|to)|settle (?:on|for)|"
    rf"stick with|vote for|answer with|conclude(?: that)?(?: it)?|would say|i['’]d say|i say|bet on)[\s:]+{SURELY}"
    rf"|(?<!\w)(?:it|that|this|which|they|he|she)\s*(?:['’]s|is|are|was|must be|should be|would be|has to be)[\s:]+{SURELY}"
    rf"|(?<!\w)(?:so|therefore|thus|hence|conclusion|then|leaving|leaves|left with)[\s,:]+{SURELY}"
    r"|(?<!\w)(?:most likely|probably|definitely|clearly|certainly|surely|obviously|i think|i believe)[\s,:]+)"
    r"[\s\"'“”‘’(\[<:]*(?:(?:option|choice|letter|answer)\s+)?[\s\"'“”‘’(\[<]*\Z",
    re.IGNORECASE,
)
WEAK_CUE = re.compile(r"(?<!\w)(?:only|is|be|namely|but)[\s,:]+[\s\"'“”‘’(\[<]*\Z", re.IGNORECASE)
NAMED = re.compile(r"(?<!\w)(?:option|choice|letter)\s*[:#]?\s*[\"'“(\[]*\Z", re.IGNORECASE)
CAN_FOLLOW = re.compile(  # what can stand after a letter, but not after the article A
    r"\s*(?:$|[^\w\s]|(?:is|isn['’]t|was|are|be|seems?|looks?|looked|seemed|appears?|because|since|as|would|must|should|"
    r"can|can['’]t|"
    r"cannot|could|will|may|might|has|doesn['’]t|does|matches|fits|shows|and|or|nor|but|for|with|in|due|given|by|than|"
    r"rather|instead|not|fails|contradicts|seemed|wins|only|then|so|here|over|which|that|"
    r"it|this|they|you|we|he|she|at first|[A-Z]\b)(?!\w))",
    re.IGNORECASE,
)
ARTICLE = re.compile(r"(?:an?|the)\s+(?=\S)", re.IGNORECASE)
WORD_BEFORE = re.compile(r"([^\W\d_][\w'’]*) \Z")
BEFORE_LETTER = re.compile(
    r"\w+ly|\w+['’]\w+|[A-Z]|is|are|was|be|been|being|it|say|said|think|thought|guess|guessed|choose|chose|chosen|pick|picked|select|"
    r"selected|with|for|to|towards?|at|on|of|than|and|or|nor|not|but|so|then|thus|hence|also|only|both|either|neither|"
    r"between|maybe|perhaps|hmm+|ok|okay|yes|no|like|most|just|out|except|eliminate|exclude|answer|ans|answered|that|"
    r"believe|becomes?|means?|considered|consider|leaves?|leaving|as|if|whether|because|since|the|now|see|"
    r"mark|marked|label\w*|circle\w*|prefer|want|trust|could|would|surely|discard\w*|reject\w*|doubt|from|while|"
    r"although|though|unless|why|probable|likely|final|correct|right|wrong|incorrect|reply|respond|response",
    re.IGNORECASE,
)
GOES_ON = re.compile(r"[.,]?\d|\s*[%°‰]|\s*[-–/×*^]\s*\d")  # after a number: it is another number
BRACKETS = "()[]\"' "
EDGE = " \t\n\"'“”‘’()[]<>.,:;!?-—–"
