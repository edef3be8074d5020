"""The pack's workflows in the template browser."""

from attune.tests.browser.page import MODULE
from attune.tests.server import workflow

CARD = "[data-testid^='template-workflow-Attune']"


def test_the_template_browser_shows_every_workflow_with_its_picture(comfy):
    page = comfy.page
    with page.expect_response("**/workflow_templates/**/*.jpg") as first:
        page.locator(".templates-tab-button").click()
        page.locator(".workflow-template-selector-dialog nav").last.get_by_text(MODULE, exact=True).click()
    assert first.value.ok and first.value.headers["content-type"] == "image/jpeg"
    cards = page.locator(CARD)
    cards.first.wait_for()
    comfy.shot("templates")
    while (before := cards.count()) < len(workflow.NAMES):  # more of them come when the end is in sight
        cards.last.hover()
        page.mouse.wheel(0, 10_000)
        page.wait_for_function("([card, count]) => document.querySelectorAll(card).length > count", arg=[CARD, before])
    names = [card.get_attribute("data-testid").removeprefix("template-workflow-") for card in cards.all()]
    assert set(names) == set(workflow.NAMES)
    for name in names:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()  # or its picture is not fetched
        page.wait_for_function("img => img.complete && img.naturalWidth > 0", arg=card.locator("img").element_handle())
        assert card.locator("h3").inner_text() == name
    assert not comfy.errors


def test_a_click_on_a_card_opens_the_workflow(comfy):
    page = comfy.page
    comfy.command("Comfy.NewBlankWorkflow")
    page.locator(".templates-tab-button").click()
    page.locator(".workflow-template-selector-dialog input").first.fill(workflow.DEMO)
    page.get_by_test_id(f"template-workflow-{workflow.DEMO}").click()
    page.wait_for_function(  # where it is open already, this one has a number behind its name
        "name => app.extensionManager.workflow.activeWorkflow.filename.startsWith(name)", arg=workflow.DEMO
    )
    comfy.drawn()
    assert not comfy.complaints()
    assert comfy.prompt() == workflow.load(workflow.DEMO)
