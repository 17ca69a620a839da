"""The words of the rule labeller: what mentions a finding, what denies it, what doubts it, and where a scope ends.

Regular expressions on lower-case text; a space stands for a space or a hyphen; where two match at one place the first wins.
Ideas of what counts as a mention: stanfordmlgroup/chexpert-labeler (phrases/, patterns/), ncbi-nlp/NegBio (patterns/); the
lists are our own, made on the train split of the Indiana reports. Where they depart: docs/labeller.md.
"""

NO_FINDING = "No Finding"
ENLARGED = "Enlarged Cardiomediastinum"
CARDIOMEGALY = "Cardiomegaly"
OPACITY = "Lung Opacity"
LESION = "Lung Lesion"
EDEMA = "Edema"
CONSOLIDATION = "Consolidation"
PNEUMONIA = "Pneumonia"
ATELECTASIS = "Atelectasis"
PNEUMOTHORAX = "Pneumothorax"
EFFUSION = "Pleural Effusion"
PLEURAL = "Pleural Other"
FRACTURE = "Fracture"
DEVICES = "Support Devices"
OTHER = "other"
"""Any further abnormality: only keeps a report from being No Finding."""

_SIZE_OF = r"(?:size|silhouette|shadow|contours?|border|diameter|outline)"

ANATOMY = {
    CARDIOMEGALY: [
        rf"(?:cardiac|heart|cardiopericardial|cardiovascular) (?:and mediastinal )?{_SIZE_OF}s?",
        r"heart(?! failure| disease| valves?| rate| block| monitor)", r"cardiac(?= and (?:mediastin|hilar|aort))",
    ],
    ENLARGED: [
        rf"cardio ?mediastin(?:um|al)(?: (?:and hilar )?{_SIZE_OF}s?| structures?)?",
        rf"mediastin(?:um|al)(?: and hilar| and cardiac)? (?:{_SIZE_OF}s?|structures?|width|silhouettes?)", r"mediastinum",
        r"mediastinal(?= (?:and|or) (?:hilar|cardiac))", r"mediastinal(?= (?:is|are|appears?))",
    ],
}  # fmt: skip
"""Findings that are the state of an organ: the organ's names; a normal one is a 0, an unjudged one no mention."""

MENTIONS = {
    CARDIOMEGALY: [r"cardiomegaly", r"megalocardia", r"cardiac enlargement", r"cardiac hypertrophy"],
    ENLARGED: [r"(?:cardio ?)?mediastinal (?:widening|enlargement|prominence)"],
    (EFFUSION, PNEUMOTHORAX): [r"hydro ?pneumothora(?:x|ces)", r"hemo ?pneumothora(?:x|ces)"],
    EFFUSION: [
        r"(?<!pericardial )(?<!joint )effusions?", r"pleural fluid", r"hydrothorax", r"hemothorax", r"empyema",
        r"fluid in the (?:\w+ ){0,2}pleural spaces?",
    ],
    PLEURAL: [
        r"(?:pleural|pleuro parenchymal|pleuroparenchymal|fissural)(?: and \w+)? (?:\w+ )?"
        r"(?:thickening|scar(?:ring|s)?|plaques?|calcifications?|fibrosis|cap|caps|reaction)",
        r"thickening of the (?:\w+ ){0,2}(?:pleura|fissures?)", r"fibrothorax", r"apical (?:cap|caps|capping|thickening)",
        r"pleural densit(?:y|ies)",
    ],
    PNEUMOTHORAX: [r"pneumothora(?:x|ces|xes|cies)"],
    ATELECTASIS: [
        r"atelect\w+", r"(?:lobe|lobar|lung|lobes) collapse\b", r"collapse(?: of)?(?: the)? (?:\w+ ){0,4}(?:lobe|lung)",
        r"collapsed (?:\w+ ){0,3}(?:lobe|lung)",
    ],
    PNEUMONIA: [
        r"(?:broncho ?)?pneumonias?", r"(?<!granulomatous )(?<!histoplasma )infection", r"infectious(?: process| etiology| infiltrates?)?",
        r"pneumonitis", r"pneumonic",
    ],
    EDEMA: [
        r"o?edema", r"congestive heart failure", r"heart failure", r"chf",
        r"(?:vascular|pulmonary|venous|interstitial|pulmonary vascular) congestion", r"congestion",
        r"vascular (?:prominence|engorgement|redistribution|indistinctness|fullness)",
        r"(?:increased|prominent|engorged|indistinct|congested) (?:central |pulmonary |perihilar |lung |the )*"
        r"(?:vascularity|vasculature|vascular (?:markings|structures))",
        r"prominence of (?:the )?(?:central |pulmonary |perihilar )*(?:vascularity|vasculature|vessels)",
        r"(?:vascularity|vasculature)(?= (?:is|are|appears?|remains?) (?:(?!not)\w+ )?(?:increased|prominent|congested|engorged|indistinct))",
        r"cephali[sz]ation", r"(?:kerley|septal) lines",
    ],
    CONSOLIDATION: [r"consolidat(?:ions?|ive|ed)"],
    FRACTURE: [r"(?:micro)?fractures?", r"fractured"],
    OTHER: [
        r"(?:calcified|calcific) (?:\w+ ){0,3}(?:nodul\w+|granulom\w*|densit\w+|opacit\w+|lesions?|mass)", r"granulom\w*", r"emphysem\w+",
        r"hyperinflat\w+", r"hyperexpan\w+", r"hyperexten\w+", r"hyper ?lucen\w+", r"scolio\w+", r"dextroscolio\w+", r"levoscolio\w+",
        r"\w*curvature", r"kypho\w+", r"degenerat\w+", r"osteophyt\w+", r"spondylo\w+", r"calcif\w+", r"atheroscl\w+", r"tortuo\w+", r"ectas\w+",
        r"ectatic", r"uncoil\w+", r"unfold\w+", r"hernia\w*", r"copd", r"chronic obstructive(?: pulmonary)?(?: disease)?", r"blunt(?:ing|ed)",
        r"eventration", r"elevat\w+", r"deformit\w+", r"osteop(?:enia|enic|orosis|orotic)", r"arthr\w+", r"low (?:lung |inspiratory )?volumes?",
        r"hypoinflat\w+", r"hypoaerat\w+", r"hypoventilat\w+", r"volume loss", r"bronchi(?:tis|olitis|ectasis|ectatic)", r"cuffing", r"asthma",
        r"bull(?:ae|ous|a)", r"aneurysm\w*", r"lymphadenopathy", r"adenopathy", r"crowding", r"flattening", r"flattened", r"sarcoid\w*",
        r"tuberculo\w+", r"pneumoperitoneum", r"pneumomediastinum", r"subcutaneous emphysema", r"pericardial effusions?", r"dislocat\w+",
        r"sclero\w+", r"lucenc\w+", r"nipple shadows?", r"foreign (?:body|bodies)", r"hypertension", r"(?:mastectomy|pneumonectomy|lobectomy)",
        r"azygos lobe", r"wedg(?:e|ing)", r"compression", r"contusion", r"aspiration", r"bronchovascular (?:markings|prominence)", r"nonunion",
        r"metasta\w+", r"malignan\w+", r"subluxation", r"lordosis",
    ],
    LESION: [
        r"(?:fibro)?nodul(?:es?|arity|ar (?:\w+ ){0,1}(?:densit(?:y|ies)|opacit(?:y|ies)|opacification|lesions?|foc(?:us|i)|infiltrates?|shadows?))",
        r"(?:micro)?nodules?", r"mass(?:es)?\b(?! effect)", r"mass ?like (?:\w+ )?(?:densit(?:y|ies)|opacit(?:y|ies)|lesion|consolidation)",
        r"cavit(?:y|ary|ies|ating|ation)(?: lesions?)?", r"(?:carcinoma|neoplasms?|tumou?rs?)", r"(?:pulmonary|lung|parenchymal) lesions?",
        r"(?:round|rounded|ovoid|oval) (?:\w+ )?(?:densit(?:y|ies)|opacit(?:y|ies))", r"lump",
    ],
    OPACITY: [
        r"opaci\w+", r"air ?space (?:disease|process|infiltrat\w+|densit\w+)", r"infiltrat\w+",
        r"(?:interstitial|reticular|reticulonodular) (?:\w+ )?(?:markings?|patterns?|prominence|thickening|disease|densit\w+|changes|abnormalit\w+)",
        r"(?<!vascular )(?:lung|pulmonary|parenchymal) (?:markings?|densit\w+)", r"interstitial lung",
        r"prominence of (?:the )?(?:\w+ )?(?:interstitium|interstitial)", r"interstitium", r"reticula\w+", r"ground glass",
        r"increased densit(?:y|ies)",
        r"(?:streaky|patchy|hazy|linear|basilar|lung|airspace|retrocardiac|soft tissue) (?:(?!nodul)\w+ ){0,2}densit(?:y|ies)", r"haziness",
        r"(?:parenchymal|apical|biapical|basilar|lung|pulmonary|lingular|bibasilar|basal|interstitial) "
        r"(?:(?!pleur)\w+ )?(?:fibrosis|scars?|scarring)",
        r"scarring", r"scars?\b", r"fibrosis", r"fibrotic", r"air bronchograms?", r"(?:peribronchial|bronchial wall) thickening",
        r"parenchymal (?:disease|abnormalit\w+|process)",
    ],
    DEVICES: [
        r"pace ?makers?", r"pacer", r"pacing", r"aicd", r"icd", r"defibrillators?", r"catheters?", r"picc", r"port ?a ?cath", r"portacath",
        r"mediport", r"(?<!air )(?:central|subclavian|jugular|venous|picc|arterial|dialysis) lines?", r"(?<!lung )tubes?\b", r"tracheostomy",
        r"endotracheal", r"nasogastric", r"(?:enteric|chest|feeding) tubes?", r"stents?",
        r"(?:valve|valvular) (?:replacement|prosthe\w+|repair)", r"prosthe(?:sis|tic|ses)(?: \w+ valve)?",
        r"(?:surgical|cholecystectomy|vascular|hilar|mediastinal|axillary|metallic) (?:\w+ )?(?:clips?|staples)", r"clips?\b", r"sutures?",
        r"(?:sternotomy|sternal|cerclage) (?:\w+ )?(?:wires?|sutures)", r"sternotomy xxxx", r"wires?\b",
        r"(?:orthopedic|spinal|surgical|fixation|fusion|metallic|internal) hardware", r"hardware",
        r"(?:fixation|harrington|surgical|spinal) rods?", r"screws?", r"(?:fusion|fixation) plate\w*", r"plate\b(?! like)", r"arthroplast\w+",
        r"spinal fusion", r"(?:cervical|anterior|thoracic|lumbar) fusion", r"breast implants?", r"implant\w*", r"stimulator\w*", r"electrodes?",
        r"(?:ekg|ecg|monitor\w*|overlying|cardiac|pacing|pacer|external) (?:\w+ )?leads?",
        r"leads?(?= (?:is|are|in|over|tip|within|project|remain|overl|terminat|xxxx the))",
        r"tips?(?= (?:\w+ ){0,6}(?:svc|vena|cavoatrial|carina|stomach|atrium|ventricle|atriocaval))",
        r"(?:chest|cardiac|venous|subclavian) xxxx(?= (?:\w+ ){0,3}(?:tip|leads?|generator|terminat|in stable position))", r"surgical xxxx",
        r"(?:cardiac|monitoring|support|electronic|medical|vascular access|implanted) devices?",
        r"ports?\b(?= (?:tip|in|with|is|over|catheter))", r"cannula", r"drain\b", r"lap band", r"gastric band", r"loop recorder", r"coils?\b",
        r"filter\b", r"ivc xxxx",
    ],
}  # fmt: skip
"""Finding, or several at once -> its mentions. OTHER comes before LESION and OPACITY: a calcified nodule is neither."""

CLEAR_LUNGS = (
    r"(?:lungs?(?: fields?| parenchyma| xxxx)?|lung bases)(?=(?: (?!not)\w+){0,4}? clear(?! of| from))|"
    r"clear (?:lungs?|lung (?:fields|xxxx|parenchyma|bases))"
)
"""Says Lung Opacity 0."""

ALL_NORMAL = (
    r"no (?:\w+ ){0,3}(?:acute|active|significant|radiographic|evidence of) (?:(?!change)\w+ ){0,5}"
    r"(?:abnormalit\w+|disease|process|findings?|pathology|pulmonary|cardiopulmonary)|"
    r""
    r"(?:normal|unremarkable|negative) (?:\w+ ){0,3}(?:chest|exam|examination|radiographs?|study|film|x ray|x xxxx)|"
    r"(?:chest|exam|examination|study) (?:is )?(?:\w+ )?(?:normal|unremarkable|negative)|"
    r"no (?:\w+ )?abnormalit\w+|no acute (?:change|process)"
)
"""Says that the whole is well; alone enough for No Finding."""

# An organ's state, by the nearest of these.
NORMAL_STATE = (
    r"normal|unremarkable|within limits|not (?:\w+ )?(?:enlarged|widened|dilated|prominent)|top normal|"
    r"upper (?:limits?|range|end)(?: of)? normal|upper normal|high normal|negative|not enlarg\w+"
)
BORDERLINE_STATE = (
    r"(?:upper limits?(?: of)? normal|top normal)(?: in size)? (?:or|to) (?:\w+ ){0,2}(?:enlarged|increased|large)|"
    r"borderline(?: \w+)? (?:enlarged|enlargement|prominent|large)|borderline"
)
LARGE_STATE = r"enlarg\w+|prominent|prominence|widen\w+|wide|large|bigger|increased|dilat\w+|globular"

# Polarity. Forward cues reach to the end of their scope, backward cues from the clause's start to themselves.
NOT_NEGATION = (
    r"no (?:(?:significant|interval|definite|appreciable|substantial|major|gross|marked|important|evidence of|other) )*changes?\b|"
    r"without (?:\w+ ){0,2}changes?(?: in)?\b|not (?:\w+ )?changed|"
    r"no (?:\w+ ){0,2}(?:increase|decrease|improvement|progression|interval) (?:in|of)|"
    r"not only|not (?:significantly|substantially|appreciably)|no longer|without (?:contrast|iv)|no (?:prior|previous|comparison)|"
    r"not necessarily|no doubt"
)
"""Hold a "no" that denies no finding."""
DOUBT_STRONG = (
    r"(?:can ?not|can not|could not|can't|difficult to|unable to|not|not possible to) "
    r"(?:\w+ ){0,2}?(?:exclude|rule out|be excluded|be ruled out|excluded)|"
    r"not (?:\w+ )?(?:excluded|ruled out)|"
    r"(?:does|do|did) not (?:\w+ )?(?:exclude|rule out)|cannot be (?:\w+ )?(?:excluded|ruled out)|"
    r"not be (?:\w+ )?(?:excluded|ruled out)|without excluding"
)
"""Win over every negation, forward and backward."""
DENY = (
    r"no|without|negative for|free of|free from|clear of|absence of|nor|neither|rather than|resolution of|"
    r"(?<!has )(?<!have )(?<!is )(?<!are )(?<!been )resolved|"
    r"(?:does|do|did|is|are|was|were) not (?:\w+ )?"
    r"(?:appear|show|demonstrate|reveal|have|suggest|identify|indicate|represent|contain|consistent|suggestive)|"
    r"clearing of|removal of|history of|excludes|excluding|"
    r"devoid of|denies|lack of|lacking|ruled out|rules out|fails to|never"
)
UNSAID = (
    r"(?:limited|limits|limiting|suboptimal) (?:\w+ )?(?:evaluation|assessment|visuali[sz]ation) (?:for|of)|"
    r"(?:evaluation|assessment)(?: for| of)(?= [^,]*(?:limited|suboptimal|difficult))|"
    r"(?:low|decreased) lung volumes? (?:\w+ )?(?:accentuat\w+)"
)
"""Say that something cannot be told: no mention."""
_SEEN = r"(?:seen|identified|present|visuali[sz]ed|demonstrated|evident|appreciated|noted|detected|observed|apparent|shown|found)"
DENIED = (
    rf"(?:is|are|was|were|has been|have been|be) (?:\w+ )?(?:not|no longer|never) (?:\w+ )?{_SEEN}|"
    r""
    rf"not (?:\w+ )?{_SEEN}|"
    r"no longer \w+|"
    r"(?:has|have|had)(?: \w+)? (?:completely |nearly |essentially )?(?:resolved|cleared|been removed|disappeared)|"
    r"(?:is|are|was|were) (?:absent|excluded|ruled out|resolved|gone|negative|removed|unlikely)|"
    r"resolved|unlikely|absent|(?:is|are|was|were|appears?|remains?)(?: \w+)? (?:normal|unremarkable)|"
    r"within (?:the )?(?:normal limits|limits of normal)"
)
DOUBT = (
    r"possib\w+|probabl[ey]|presum\w+|may|might|could|questionabl[ey]|question(?: of)?|questioned|suspect\w*|suspicio\w+|concern\w*|"
    r"worrisome|suggest\w*|equivocal|potential(?:ly)?|consider\w*|differential|"
    r"rule out|r/o|evaluat\w+ for|correlat\w+|perhaps|indeterminate|versus|vs\.?|uncertain|less likely|favou?r\w*|can be|and/or|"
    r"conceivabl[ey]|to exclude|exclude"
)
DOUBTED = (
    r"(?:is|are|was|were|be|remains?) (?:\w+ )?"
    r"(?:possible|probable|suspected|questioned|questionable|considered|not excluded|equivocal|uncertain|difficult to exclude|likely)|"
    r""
    r"(?:may|might|could|can)(?: also)? be (?:present|seen|considered|there|due|related|a possibility)|suspected|less likely|versus|"
    r"vs\.?|a (?:possibility|consideration|concern)|and/or"
)
SCOPE_END = (
    r"but|however|although|though|except|besides|apart from|aside from|other than|otherwise|whereas|while|yet|"
    r"there (?:is|are|was|were|has|have)|which (?:is|are)|"
    r"again (?:seen|noted)|is (?:again )?(?:seen|noted|present)|are (?:again )?(?:seen|noted|present)|as well as a"
)
"""Close every scope that began before."""
LIST_ENDS_BEFORE = (
    r"(?:a |an |the )?(?:is |are )?(?:stable|unchanged|small|mild|mildly|minimal|moderate|large|severe|tiny|trace|right|left|bilateral|"
    r"bibasilar|biapical|new|persistent|redemonstrated|interval|chronic|old|increased|"
    r"prominent|low|scattered|multiple|patchy|streaky|heart|cardiac|lungs?|mediastinal|cardiomediastinal|enlarged|calcified|status post|"
    r"there|with|improved|worsening|continued|residual|healed|degenerative|xxxx change)"
)
"""Begin a new statement after a comma or an "and" of a list under a negation, where no "or" or "nor" follows."""

RIGHT = r"right(?: sided)?|middle lobe|rml|rul|rll"
LEFT = r"left(?: sided)?|lingular?|lul|lll"
BOTH = r"bilateral(?:ly)?|both|bibasilar|biapical|bibasal|bases|bilat"
